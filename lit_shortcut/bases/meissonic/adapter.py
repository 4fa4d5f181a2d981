"""Meissonic's answer to the base protocol."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lit_shortcut.bases.clip_text import EncodedContext, TextEncoder, encoded_context
from lit_shortcut.bases.meissonic.transformer import TIME_SCALE, MeissonicTransformer
from lit_shortcut.contracts import Clock, Conditions, Context, ImageDecoder, TokenSpec
from lit_shortcut.weights import fingerprint, network_fingerprint

NEGATIVE = (
    "worst quality, low quality, low res, blurry, distortion, watermark, logo, signature, text, jpeg artifacts, "
    "signature, sketch, duplicate, ugly, identifying mark"
)
"""The negative prompt of the authors' own script for Monetico."""


class Meissonic(nn.Module):
    """A frozen Meissonic, or Monetico, with its text encoder and image decoder.

    Features are the rows that the blocks see, before they are upsampled: a quarter as many as tokens where the
    transformer resamples, as many where it doesn't. They depend on the number of steps that are left, so a shortcut
    goes with the number of steps it was recorded at.

    Args:
        transformer: the network that is accelerated.
        tokenizer: decodes image tokens to images.
        text_encoder: of prompts.
        height: of the images in pixels.
        width: of the images in pixels.
        patch_size: side in pixels of the square that a token stands for.
        negative: prompt of the unconditional branch.

    Raises:
        ValueError: if height or width is no positive multiple of what the transformer can do.
    """

    def __init__(
        self,
        transformer: MeissonicTransformer,
        tokenizer: ImageDecoder,
        text_encoder: TextEncoder,
        *,
        height: int,
        width: int,
        patch_size: int = 16,
        negative: str = NEGATIVE,
    ) -> None:
        super().__init__()
        multiple = patch_size * transformer.stride
        for name, pixels in (("height", height), ("width", width)):
            if pixels < 1 or pixels % multiple:
                raise ValueError(f"{name} must be a positive multiple of {multiple} pixels, got {pixels}")
        self.size, self.grid = (height, width), (height // patch_size, width // patch_size)
        self.transformer, self.tokenizer, self.text_encoder = transformer, tokenizer, text_encoder
        self.negative = negative
        self.eval().requires_grad_(False)
        self.interface = transformer.interface(*self.grid)
        self.spec = TokenSpec(
            num_tokens=self.interface.num_tokens,
            sequence_length=self.interface.num_rows,
            width=transformer.width,
            codebook_size=transformer.codebook_size,
            mask_id=transformer.mask_id,
            num_classes=0,
            grid_height=self.grid[0],
        )

    @cached_property
    def fingerprint(self) -> str:
        """Of the transformer's weights; computed when first asked for, since it reads all of them."""
        return fingerprint(self.transformer.state_dict())

    def train(self, mode: bool = True) -> Meissonic:
        """Stay in eval mode: a base is frozen."""
        return super().train(False)

    def identity(self) -> dict[str, Any]:
        """Fingerprints of transformer, image decoder and text encoder, the negative prompt and the images' size."""
        return {
            "class": type(self).__name__,
            "fingerprint": self.fingerprint,
            "decoder": network_fingerprint(self.tokenizer),
            "text_encoder": self.text_encoder.identity(),
            "negative": self.negative,
            "size": list(self.size),
        }

    def context(self, conditions: Conditions, *, guided: bool) -> Context:
        """Encoded prompts; the unconditional branch has the negative one.

        Raises:
            ValueError: if there is not a prompt for each sample, or one is empty.
        """
        return encoded_context(self.text_encoder, conditions, self.negative, self.size, guided=guided)

    def features(self, tokens: Tensor, context: Context, clock: Clock) -> Tensor:
        """Features (G, B, S, C), both branches in one batch; time is the number of steps that follow this one.

        Raises:
            ValueError: if float16 cannot hold the time, with 67 steps or more.
        """
        assert isinstance(context, EncodedContext)
        left = clock.num_steps - 1 - clock.step
        if context.states.dtype == torch.float16 and left * TIME_SCALE > torch.finfo(torch.float16).max:
            raise ValueError(f"num_steps must be at most 66 in float16, got {clock.num_steps}; take bfloat16")
        branches = len(context.states)
        stacked: Tensor = self.transformer(
            tokens.repeat(branches, 1).unflatten(1, self.grid),
            context.states.flatten(0, 1),
            context.pooled.flatten(0, 1),
            context.micro_conds.flatten(0, 1),
            torch.full((1,), left, device=tokens.device),
        )
        return stacked.unflatten(0, (branches, -1))

    def decode(self, tokens: Tensor) -> Tensor:
        """Images, uint8 (B, 3, height, width), of codes ``tokens`` (B, L)."""
        return self.tokenizer.decode(tokens)
