"""The answer of a LLaDA that draws images, behind its prompt in one sequence, to the base protocol."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from lit_shortcut.bases.dimoo.llada import LLaDA
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
from lit_shortcut.weights import fingerprint, network_fingerprint


@dataclass(frozen=True, kw_only=True)
class PromptContext(Context):
    """Prompts as token ids, padded to the longest, and where all rows stand.

    Args:
        ids: (G, B, P).
        cos: (G, B, 1, S, D/2), of the rotation of each row.
        sin: the same.
        is_real: (G, B, S), false at rows behind a shorter prompt.
    """

    ids: Tensor
    cos: Tensor
    sin: Tensor
    is_real: Tensor


class ImageTokens(NamedTuple):
    """How an image stands behind its prompt, and in which tokens.

    ``grid`` is its height and width in tokens. Code k of the V = ``codebook_size`` is the token ``first_code`` + k, a
    place not yet known is ``mask``. ``frame`` (F,) are the tokens around the image's; ``row_offsets`` (L + F,), counted
    from the prompt's end, say where the image's tokens stand and then the frame's.
    """

    grid: tuple[int, int]
    codebook_size: int
    first_code: int
    mask: int
    frame: Tensor
    row_offsets: Tensor


class PromptedLLaDA(nn.Module, ABC):
    """A frozen text-to-image LLaDA with its tokenizers.

    Rows of the features are the image tokens, row by row, then the tokens that frame them, then the prompt. Attention
    does not mind the order, since each row is rotated by its place in the sequence: so image rows come first whatever
    the prompt's length, and padding comes last.

    Args:
        transformer: the network that is accelerated.
        tokenizer: decodes image tokens to images.
        special: ids of the tokens that are no text, a dataclass.
        image: how an image stands behind its prompt.
        max_prompt_tokens: longest prompt, special tokens included.

    Raises:
        ValueError: if a code or a special token lies outside the vocabulary.
    """

    def __init__(
        self,
        transformer: LLaDA,
        tokenizer: ImageDecoder,
        *,
        special: Any,
        image: ImageTokens,
        max_prompt_tokens: int,
    ) -> None:
        super().__init__()
        require_at_least(1, max_prompt_tokens=max_prompt_tokens, codebook_size=image.codebook_size)
        self.special = special
        self.transformer, self.tokenizer = transformer, tokenizer
        self.image, self.max_prompt_tokens = image, max_prompt_tokens
        self.eval().requires_grad_(False)
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
        """Token ids of ``prompt`` with the special tokens around it; ValueError where it is too long to be taken."""

    @abstractmethod
    def unconditional_ids(self) -> list[int]:
        """Token ids that stand for a prompt in the unconditional branch."""

    @cached_property
    def fingerprint(self) -> str:
        """Of the transformer's weights; computed when first asked for, since it reads all of them."""
        return fingerprint(self.transformer.state_dict())

    def train(self, mode: bool = True) -> PromptedLLaDA:
        """Stay in eval mode: a base is frozen."""
        return super().train(False)

    def identity(self) -> dict[str, Any]:
        """Fingerprints of transformer and image decoder, special tokens, and the shape of the images."""
        return {
            "class": type(self).__name__,
            "fingerprint": self.fingerprint,
            "decoder": network_fingerprint(self.tokenizer),
            "special": asdict(self.special),
            "grid": list(self.spec.grid),
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
        lengths = [[len(ids) for ids in branch] for branch in texts]
        longest = max(max(branch) for branch in lengths)
        padded = [[ids + [0] * (longest - len(ids)) for ids in branch] for branch in texts]
        num_control = [lengths[0], *([0] * len(branch) for branch in lengths[1:])]
        ids = torch.tensor(padded, device=self.frame_ids.device)
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
        """Features (G, B, S, C); rows behind a shorter prompt are 0.

        Branches run one after the other: prompts of one branch are often equally long, and attention is faster
        without a mask.
        """
        assert isinstance(context, PromptContext)
        ids = torch.where(tokens == self.spec.mask_id, self.image.mask, tokens + self.image.first_code)
        image = torch.cat([ids, self.frame_ids.expand(len(ids), -1)], dim=1)
        return torch.stack([self._features(image, context, branch) for branch in range(len(context.ids))])

    def decode(self, tokens: Tensor) -> Tensor:
        """Images, uint8 (B, 3, height, width), of codes ``tokens`` (B, L)."""
        return self.tokenizer.decode(tokens)

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


class Untrained(PromptedLLaDA):
    """Mixin, before the class of a base: its fingerprint says that its weights are random."""

    @cached_property
    def fingerprint(self) -> str:
        """That of the weights behind ``random-``."""
        return f"random-{super().fingerprint}"


def grid_of(height: int, width: int, patch_size: int) -> tuple[int, int]:
    """Height and width in tokens of images of ``height`` × ``width`` pixels.

    Raises:
        ValueError: if either is no positive multiple of ``patch_size``.
    """
    require_at_least(1, patch_size=patch_size)
    for name, size in (("height", height), ("width", width)):
        if size < 1 or size % patch_size:
            raise ValueError(f"{name} must be a positive multiple of {patch_size} pixels, got {size}")
    return height // patch_size, width // patch_size
