"""LLaDAs that draw an image after its prompt in one sequence, behind the base protocol."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from lit_shortcut.bases.dimoo.llada import LLaDA
from lit_shortcut.bases.dimoo.prompt import PromptTokenizer
from lit_shortcut.bases.frozen import FrozenBase
from lit_shortcut.bounds import require_at_least
from lit_shortcut.contracts import (
    Clock,
    Conditions,
    Context,
    ImageDecoder,
    Prefix,
    PrefixSize,
    TokenSpec,
    require_prompts,
)
from lit_shortcut.interface import TokenInterface
from lit_shortcut.networks.llada import Rotation


@dataclass(frozen=True, kw_only=True)
class PromptContext(Context):
    """Prompts as token ids, padded to the longest, and the places of all rows.

    Args:
        ids: (G, B, P).
        cos: (G, B, 1, S, D), ``cos`` of each row's :class:`~lit_shortcut.networks.llada.Rotation`.
        sin: its ``sin``, of the same shape.
        is_real: (G, B, S), false at rows after a shorter prompt.
    """

    ids: Tensor
    cos: Tensor
    sin: Tensor
    is_real: Tensor


class ImageTokens(NamedTuple):
    """Tokens of an image and their places after its prompt.

    ``grid`` is the image's height and width in tokens. Code k of the V = ``codebook_size`` is the token ``first_code``
    + k, an unknown place is ``mask``. ``frame`` (F,) are the tokens around the image's; ``row_offsets`` (L + F,) are
    the places of the image's tokens and then of the frame's, counted from the prompt's end.
    """

    grid: tuple[int, int]
    codebook_size: int
    first_code: int
    mask: int
    frame: Tensor
    row_offsets: Tensor


class PromptedLLaDA(FrozenBase, ABC):
    """A frozen text-to-image LLaDA with its tokenizers.

    Rows of the features are the image tokens, row by row, then the tokens that frame them, then the prompt. Attention
    is indifferent to the order, since each row is rotated by its place in the sequence: so image rows come first for
    any length of the prompt, and padding comes last.

    Args:
        transformer: the network that is accelerated.
        tokenizer: decodes image tokens to images.
        prompt_tokenizer: maps text to token ids.
        special: ids of the tokens that are not text, a dataclass.
        image: tokens of an image and their places.
        max_prompt_tokens: longest prompt, special tokens included.
        negative: prompt of the unconditional branch.

    Raises:
        ValueError: if a code or a special token lies outside the vocabulary.
    """

    def __init__(
        self,
        transformer: LLaDA,
        tokenizer: ImageDecoder,
        prompt_tokenizer: PromptTokenizer,
        *,
        special: Any,
        image: ImageTokens,
        max_prompt_tokens: int,
        negative: str,
    ) -> None:
        require_at_least(1, max_prompt_tokens=max_prompt_tokens, codebook_size=image.codebook_size)
        super().__init__(transformer, tokenizer)
        self.special, self.image, self.max_prompt_tokens = special, image, max_prompt_tokens
        self.prompt_tokenizer, self.negative = prompt_tokenizer, negative
        first, end = image.first_code, image.first_code + image.codebook_size
        vocab_size = transformer.wte.num_embeddings
        if end > vocab_size:
            raise ValueError(f"codes {first}..{end - 1} lie outside the transformer's vocabulary of {vocab_size}")
        outside = {name: id_ for name, id_ in asdict(special).items() if not 0 <= id_ < vocab_size}
        if outside:
            raise ValueError(f"special tokens {outside} lie outside the transformer's vocabulary of {vocab_size}")
        height, width = image.grid
        self.frame_ids: Tensor
        self.register_buffer("frame_ids", image.frame, persistent=False)
        self.interface = TokenInterface(
            num_tokens=height * width,
            code_embedding=transformer.wte.weight[first:end],
            head_weight=transformer.head_weight[first:end],
            row_offsets=image.row_offsets,
        )
        self.spec = TokenSpec(
            num_tokens=height * width,
            sequence_length=height * width + len(image.frame) + max_prompt_tokens,
            width=transformer.wte.embedding_dim,
            codebook_size=image.codebook_size,
            mask_id=image.codebook_size,
            num_classes=0,
            grid_height=height,
        )

    @abstractmethod
    def prompt_ids(self, prompt: str) -> list[int]:
        """Token ids of ``prompt`` with the special tokens around it; raises ValueError if it is too long."""

    @abstractmethod
    def unconditional_ids(self) -> list[int]:
        """Token ids of the prompt of the unconditional branch."""

    def identity(self) -> dict[str, Any]:
        """Identity of the base, with its prompts' tokens, the negative prompt and the shape of the images."""
        return super().identity() | {
            "special": asdict(self.special),
            "grid": list(self.spec.grid),
            "prompt_tokenizer": self.prompt_tokenizer.identity(),
            "negative": self.negative,
        }

    def context(self, conditions: Conditions, *, guided: bool) -> Context:
        """Token ids of the prompts; the unconditional branch has a prompt of its own.

        Raises:
            ValueError: if there is not a prompt for each sample, or one is empty or too long.
        """
        prompts = require_prompts(conditions)
        texts = [[self.prompt_ids(prompt) for prompt in prompts]]
        if guided:
            texts.append([self.unconditional_ids()] * len(prompts))
        return self.context_of(texts)

    def context_of(self, texts: Sequence[Sequence[list[int]]]) -> Context:
        """Return the context of the token ids of a prompt for each branch and sample, ``texts[branch][sample]``."""
        lengths = [[len(ids) for ids in branch] for branch in texts]
        longest = max(max(branch) for branch in lengths)
        padded = [[ids + [0] * (longest - len(ids)) for ids in branch] for branch in texts]
        num_control = [lengths[0], *([0] * len(branch) for branch in lengths[1:])]
        ids = torch.tensor(padded).to(self.frame_ids.device, non_blocking=True)
        num_rows = self.spec.num_tokens + len(self.frame_ids) + longest
        places, is_real = self.interface.row_places(torch.tensor(lengths).flatten(), num_rows)
        cos, sin = (part.unflatten(0, ids.shape[:2]) for part in self.transformer.rotation(places))
        return PromptContext(
            ids=ids,
            cos=cos,
            sin=sin,
            is_real=is_real.unflatten(0, ids.shape[:2]),
            prefix=Prefix(torch.tensor(lengths), self.transformer.wte(ids), torch.tensor(num_control)),
            prefix_sizes=tuple(map(PrefixSize.of, lengths, num_control)),
        )

    def features(self, tokens: Tensor, context: Context, clock: Clock) -> Tensor:
        """Features (G, B, S, C); rows after a shorter prompt are 0.

        Branches run one after the other: prompts of one branch often have equal lengths, and attention is faster
        without a mask.
        """
        assert isinstance(context, PromptContext)
        ids = torch.where(tokens == self.spec.mask_id, self.image.mask, tokens + self.image.first_code)
        image = torch.cat([ids, self.frame_ids.expand(len(ids), -1)], dim=1)
        return torch.stack([self._features(image, context, branch) for branch in range(len(context.ids))])

    def _features(self, image: Tensor, context: PromptContext, branch: int) -> Tensor:
        size, prompt = context.prefix_sizes[branch], context.ids[branch]
        sequence = torch.cat([image, prompt[:, : size.longest]], dim=1)
        num_rows = sequence.shape[1]
        by = Rotation(*(part[branch, ..., :num_rows, :] for part in (context.cos, context.sin)))
        if size.is_padded:
            is_real = context.is_real[branch, :, :num_rows]
            features = self.transformer(sequence, by, is_real) * is_real[..., None]
        else:
            features = self.transformer(sequence, by)
        return pad(features, (0, 0, 0, prompt.shape[1] - size.longest))
