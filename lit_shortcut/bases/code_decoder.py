"""Image decoders that follow taming-transformers' VQGAN (Esser et al., arXiv 2012.09841); diffusers computes them."""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt

import torch
from diffusers.models.autoencoders.vae import Decoder
from torch import Tensor, nn
from torch.nn import functional as F

from lit_shortcut.bounds import require_at_least
from lit_shortcut.precision import KeptDtype

_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


class CodeDecoder(KeptDtype):
    """Decoder from codes to colour images: a code table, a 1×1 convolution and the decoder half of a VQGAN.

    Args:
        codebook_size: V, number of codes.
        code_width: values in a code.
        latent_width: channels between the 1×1 convolution and the decoder.
        width: channels at full resolution.
        multipliers: channels at each level in units of ``width``, from full resolution down; each level after the first
            halves the resolution.
        num_blocks: residual blocks at each level.
        attention_levels: levels that have self-attention.
        is_normalised: whether codes are scaled to unit length before they are decoded.
        is_rounded: whether shades are rounded to the nearest of 256; otherwise truncated, as in some references.
        chunk: images decoded at once.

    Raises:
        ValueError: if there is not a number of blocks, at least 1, for each level.
    """

    def __init__(
        self,
        codebook_size: int,
        code_width: int,
        latent_width: int,
        width: int = 128,
        multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        num_blocks: Sequence[int] = (3, 3, 3, 3, 3),
        attention_levels: Sequence[int] = (),
        *,
        is_normalised: bool = False,
        is_rounded: bool = True,
        chunk: int = 8,
    ) -> None:
        super().__init__()
        if len(num_blocks) != len(multipliers) or min(num_blocks) < 1:
            raise ValueError(
                f"num_blocks must hold a positive number for each of {len(multipliers)} levels, got {list(num_blocks)}"
            )
        require_at_least(1, codebook_size=codebook_size, code_width=code_width, latent_width=latent_width)
        require_at_least(1, width=width, chunk=chunk)
        self.hparams = {
            "codebook_size": codebook_size,
            "code_width": code_width,
            "latent_width": latent_width,
            "width": width,
            "multipliers": list(multipliers),
            "num_blocks": list(num_blocks),
            "attention_levels": list(attention_levels),
            "is_normalised": is_normalised,
            "is_rounded": is_rounded,
        }
        has_attention = [level in attention_levels for level in reversed(range(len(multipliers)))]
        self.codes = nn.Embedding(codebook_size, code_width)
        self.post_quant_conv = nn.Conv2d(code_width, latent_width, 1)
        self.decoder = Decoder(
            in_channels=latent_width,
            up_block_types=tuple("AttnUpDecoderBlock2D" if has else "UpDecoderBlock2D" for has in has_attention),
            block_out_channels=tuple(width * multiplier for multiplier in multipliers),
            layers_per_block=max(num_blocks) - 1,  # diffusers adds one at every level
        )
        for block, count in zip(self.decoder.up_blocks, reversed(num_blocks), strict=True):
            for name in ("resnets", "attentions"):
                if (parts := getattr(block, name, None)) is not None:
                    setattr(block, name, parts[:count])
        self.codebook_size, self.chunk = codebook_size, chunk
        self.is_normalised, self.is_rounded = is_normalised, is_rounded
        self.eval().requires_grad_(False)

    def decode(self, tokens: Tensor) -> Tensor:
        """Images, uint8 (B, 3, H, W), of codes ``tokens`` (B, L) on a square grid."""
        return torch.cat([self._shades(self.pixels(chunk)) for chunk in tokens.split(self.chunk)])

    def pixels(self, tokens: Tensor) -> Tensor:
        """Images (B, 3, H, W), about in [-1, 1], of codes ``tokens`` (B, L)."""
        side = isqrt(tokens.shape[1])
        codes = self.codes(tokens)
        if self.is_normalised:
            codes = F.normalize(codes, dim=-1)
        latents = self.post_quant_conv(codes.transpose(1, 2).unflatten(2, (side, side)))
        pixels: Tensor = self.decoder(latents).float()
        return pixels

    def _shades(self, pixels: Tensor) -> Tensor:
        shades = ((pixels + 1) * 127.5).clamp(0, 255)
        return (shades.round() if self.is_rounded else shades).byte()


def taming_pairs(num_levels: int) -> list[tuple[str, str]]:
    """Beginnings of names in a decoder of taming's and in that of diffusers, which counts the levels down."""
    levels = [(f"decoder.up.{level}", f"decoder.up_blocks.{num_levels - 1 - level}") for level in range(num_levels)]
    in_level = [
        (".block.#.nin_shortcut.", ".resnets.#.conv_shortcut."),
        (".block.#.", ".resnets.#."),
        (".upsample.", ".upsamplers.0."),
        *attention_pairs(".attn.#.", ".attentions.#."),
    ]
    in_middle = [
        ("block_1.", "resnets.0."),
        ("block_2.", "resnets.1."),
        *attention_pairs("attn_1.", "attentions.0."),
    ]
    pairs = [(a + b, c + d) for a, c in levels for b, d in in_level]
    pairs += [(f"decoder.mid.{theirs}", f"decoder.mid_block.{ours}") for theirs, ours in in_middle]
    return [*pairs, ("decoder.norm_out.", "decoder.conv_norm_out.")]


def attention_pairs(theirs: str, ours: str) -> list[tuple[str, str]]:
    """Beginnings of names in an attention that taming calls ``theirs`` and we call ``ours``."""
    return [(f"{theirs}{published}.", f"{ours}{diffusers}.") for published, diffusers in _ATTENTION.items()]
