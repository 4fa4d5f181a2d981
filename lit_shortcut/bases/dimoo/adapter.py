"""Lumina-DiMOO's answer to the base protocol."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from lit_shortcut.bases.dimoo.llada import LLaDA
from lit_shortcut.bases.dimoo.prompt import TEMPLATE, UNCONDITION, Frame, PromptTokenizer, SpecialTokens
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


class DiMOO(nn.Module):
    """A frozen text-to-image LLaDA with its tokenizers.

    Rows of the features are the image tokens, row by row, then answer_start, boi, the newlines, eoi and answer_end,
    then the prompt. Attention does not mind the order, since each row is rotated by its place in the sequence: so image
    rows come first whatever the prompt's length, and padding comes last.

    Args:
        transformer: the network that is accelerated.
        tokenizer: decodes image tokens to images.
        prompt_tokenizer: text to token ids.
        special: ids of the tokens that are no text.
        codebook_size: V.
        height: of the images in pixels, a multiple of ``patch_size``.
        width: of the images in pixels, a multiple of ``patch_size``.
        patch_size: side in pixels of the square that a token stands for.
        max_prompt_tokens: longest prompt taken, template included.
        template: text around a prompt, which stands at ``{}``.
        negative: prompt of the unconditional branch.

    Raises:
        ValueError: if height or width is no positive multiple of the patch size, a code lies outside the vocabulary, or
            the prompt tokenizer does not know ``<uncondition>`` by its id.
    """

    def __init__(
        self,
        transformer: LLaDA,
        tokenizer: ImageDecoder,
        prompt_tokenizer: PromptTokenizer,
        *,
        special: SpecialTokens | None = None,
        codebook_size: int = 8192,
        height: int = 1024,
        width: int = 1024,
        patch_size: int = 16,
        max_prompt_tokens: int = 512,
        template: str = TEMPLATE,
        negative: str = UNCONDITION,
    ) -> None:
        super().__init__()
        for name, size in (("height", height), ("width", width)):
            if size < 1 or size % patch_size:
                raise ValueError(f"{name} must be a positive multiple of {patch_size} pixels, got {size}")
        self.special = special or SpecialTokens()
        self.transformer, self.tokenizer = transformer, tokenizer
        self.prompt_tokenizer, self.template, self.negative = prompt_tokenizer, template, negative
        self.eval().requires_grad_(False)
        first, end = self.special.first_code, self.special.first_code + codebook_size
        if end > transformer.wte.num_embeddings:
            raise ValueError(
                f"codes {first}..{end - 1} lie outside the transformer's vocabulary of {transformer.wte.num_embeddings}"
            )
        frame = Frame(height // patch_size, width // patch_size)
        num_tokens = frame.height * frame.width
        self.frame_ids: Tensor
        self.register_buffer("frame_ids", frame.ids(self.special), persistent=False)
        self.interface = TokenInterface(
            num_tokens=num_tokens,
            code_embedding=transformer.wte.weight[first:end],
            head_weight=transformer.head_weight[first:end],
            row_offsets=frame.row_offsets(),
        )
        self.spec = TokenSpec(
            num_tokens=num_tokens,
            sequence_length=num_tokens + len(self.frame_ids) + max_prompt_tokens,
            width=transformer.wte.embedding_dim,
            codebook_size=codebook_size,
            mask_id=codebook_size,
            num_classes=0,
            grid_height=frame.height,
        )
        self.max_prompt_tokens = max_prompt_tokens
        self.unconditional = self._tokenized(negative)
        if self.special.uncondition not in prompt_tokenizer.encode(UNCONDITION):
            raise ValueError(
                f"the prompt tokenizer must know {UNCONDITION} as token {self.special.uncondition}, "
                f"but makes {prompt_tokenizer.encode(UNCONDITION)} of it: it belongs to another model"
            )

    @cached_property
    def fingerprint(self) -> str:
        """Of the transformer's weights; computed when first asked for, since it reads all of them."""
        return fingerprint(self.transformer.state_dict())

    def train(self, mode: bool = True) -> DiMOO:
        """Stay in eval mode: a base is frozen."""
        return super().train(False)

    def identity(self) -> dict[str, Any]:
        """Fingerprints of transformer, image decoder and prompt tokenizer, and how prompts and images are laid out."""
        return {
            "class": type(self).__name__,
            "fingerprint": self.fingerprint,
            "decoder": network_fingerprint(self.tokenizer),
            "prompt_tokenizer": self.prompt_tokenizer.identity(),
            "template": self.template,
            "negative": self.negative,
            "special": asdict(self.special),
            "grid": list(self.spec.grid),
        }

    def context(self, conditions: Conditions, *, guided: bool) -> Context:
        """Token ids of the prompts; the unconditional branch has a prompt of its own.

        Raises:
            ValueError: if there is not a prompt for each sample, or one is empty or too long.
        """
        prompts = require_prompts(conditions)
        texts = [[self._tokenized(prompt) for prompt in prompts]]
        if guided:
            texts.append([self.unconditional] * len(prompts))
        lengths = [[len(ids) for ids in branch] for branch in texts]
        longest = max(max(branch) for branch in lengths)
        padded = [[ids + [0] * (longest - len(ids)) for ids in branch] for branch in texts]
        num_control = [lengths[0], *([0] * len(branch) for branch in lengths[1:])]
        ids = torch.tensor(padded, device=self.frame_ids.device)
        places, is_real = self.interface.row_places(
            torch.tensor(lengths).flatten(), self.spec.num_tokens + len(self.frame_ids) + longest
        )
        cos, sin = (part.unflatten(0, ids.shape[:2]) for part in self.transformer.rotation(places))
        return PromptContext(
            ids=ids,
            cos=cos,
            sin=sin,
            is_real=is_real.unflatten(0, ids.shape[:2]),
            prefix=Prefix(torch.tensor(lengths), self.transformer.wte(ids), torch.tensor(num_control)),
            prefix_sizes=tuple(
                PrefixSize(max(own), max(control), min(own) < max(own))
                for own, control in zip(lengths, num_control, strict=True)
            ),
        )

    def features(self, tokens: Tensor, context: Context, clock: Clock) -> Tensor:
        """Features (G, B, S, C); rows behind a shorter prompt are 0.

        Branches run one after the other: prompts of one branch are often equally long, and attention is faster
        without a mask.
        """
        assert isinstance(context, PromptContext)
        ids = torch.where(tokens == self.spec.mask_id, self.special.mask, tokens + self.special.first_code)
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

    def _tokenized(self, prompt: str) -> list[int]:
        ids = self.prompt_tokenizer.encode(self.template.format(prompt))
        if len(ids) > self.max_prompt_tokens:
            raise ValueError(
                f"expected prompts of at most {self.max_prompt_tokens} tokens, template included; "
                f"{prompt[:40]!r}… has {len(ids)}"
            )
        return ids
