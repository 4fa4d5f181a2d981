"""Meissonic behind the base protocol."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_shortcut.bases.clip_text import EncodedBase, EncodedContext, TextEncoder
from lit_shortcut.bases.meissonic.transformer import TIME_SCALE, MeissonicTransformer
from lit_shortcut.contracts import Clock, Context, ImageDecoder, TokenSpec

NEGATIVE = (
    "worst quality, low quality, low res, blurry, distortion, watermark, logo, signature, text, jpeg artifacts, "
    "signature, sketch, duplicate, ugly, identifying mark"
)
"""The negative prompt of the authors' own script for Monetico."""


class Meissonic(EncodedBase):
    """A frozen Meissonic, or Monetico, with its text encoder and image decoder.

    Features are the rows that the blocks see, before they are upsampled: a quarter as many as tokens if the transformer
    resamples, else as many. They depend on the number of steps that are left, so a shortcut only fits the number of
    steps it was recorded at.

    Args:
        transformer: the network that is accelerated.
        tokenizer: decodes image tokens to images.
        text_encoder: encodes prompts.
        height: height of the images in pixels.
        width: width of the images in pixels.
        patch_size: side in pixels of the square that a token stands for.
        negative: prompt of the unconditional branch.

    Raises:
        ValueError: if height or width is not a positive multiple of the squares that the blocks see.
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
        super().__init__(
            transformer, tokenizer, text_encoder, negative, (height, width), patch_size, transformer.stride
        )
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
