"""VQGAN of taming-transformers (Esser et al., arXiv 2012.09841) as an image tokenizer; diffusers computes it."""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import VQModel
from torch import Tensor

from lit_shortcut.bases.code_decoder import taming_pairs
from lit_shortcut.bounds import require_at_least
from lit_shortcut.precision import KeptDtype
from lit_shortcut.published import Names, filled, load_state
from lit_shortcut.weights import WeightsError

_TRAINING_ONLY = ("loss.",)  # discriminator and perceptual loss, also in the checkpoint


class VQGAN(KeptDtype):
    """Tokenizer from colour images to a grid of codes and back; by default MaskGIT's f16 VQGAN with 1024 codes.

    Args:
        codebook_size: V, number of codes.
        code_width: values in a code.
        latent_width: channels between encoder and quantiser.
        width: channels at full resolution.
        multipliers: channels at each level in units of ``width``; each level after the first halves the resolution.
        num_blocks: residual blocks per level in the encoder; the decoder has one more.
        attention_levels: levels with self-attention, counted from 0, the full resolution.
        chunk: images processed at once; decoding one at 512×512 takes about 0.75 GB.
    """

    def __init__(
        self,
        codebook_size: int = 1024,
        code_width: int = 256,
        latent_width: int = 256,
        width: int = 128,
        multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        num_blocks: int = 2,
        attention_levels: Sequence[int] = (4,),
        chunk: int = 8,
    ) -> None:
        super().__init__()
        require_at_least(1, codebook_size=codebook_size, code_width=code_width, latent_width=latent_width)
        require_at_least(1, width=width, num_blocks=num_blocks, chunk=chunk)
        self.hparams = {
            "codebook_size": codebook_size,
            "code_width": code_width,
            "latent_width": latent_width,
            "width": width,
            "multipliers": list(multipliers),
            "num_blocks": num_blocks,
            "attention_levels": list(attention_levels),
        }
        has_attention = [level in attention_levels for level in range(len(multipliers))]
        self.model = VQModel(
            down_block_types=tuple("AttnDownEncoderBlock2D" if has else "DownEncoderBlock2D" for has in has_attention),
            up_block_types=tuple("AttnUpDecoderBlock2D" if has else "UpDecoderBlock2D" for has in has_attention[::-1]),
            block_out_channels=tuple(width * multiplier for multiplier in multipliers),
            layers_per_block=num_blocks,
            latent_channels=latent_width,
            num_vq_embeddings=codebook_size,
            vq_embed_dim=code_width,
        )
        self.codebook_size, self.chunk = codebook_size, chunk
        self.eval().requires_grad_(False)

    def encode(self, images: Tensor) -> Tensor:
        """Codes (B, L), row by row, of uint8 ``images`` (B, 1 or 3, H, W); grey is taken as three equal channels."""
        return torch.cat([self._encode(chunk) for chunk in images.split(self.chunk)])

    def decode(self, tokens: Tensor) -> Tensor:
        """Images, uint8 (B, 3, H, W), of codes ``tokens`` (B, L) on a square grid."""
        chunks = tokens.split(self.chunk)
        return torch.cat([((self.pixels(chunk) + 1) * 127.5).round().clamp(0, 255).byte() for chunk in chunks])

    def pixels(self, tokens: Tensor) -> Tensor:
        """Reconstructions (B, 3, H, W), about in [-1, 1], of codes ``tokens`` (B, L)."""
        side = isqrt(tokens.shape[1])
        codes = self.model.quantize.embedding(tokens).transpose(1, 2).unflatten(2, (side, side))
        reconstructions: Tensor = self.model.decode(codes, force_not_quantize=True).sample.float()
        return reconstructions

    def _encode(self, images: Tensor) -> Tensor:
        latents = self.model.encode(images.expand(-1, 3, -1, -1) / 127.5 - 1).latents
        _, _, (_, _, codes) = self.model.quantize(latents)
        return codes.view(len(images), -1)

    @classmethod
    def load_published(cls, folder: Path) -> VQGAN:
        """Load the frozen VQGAN of ``model.yaml`` and ``last.ckpt``, or ``last.safetensors`` if there is one.

        Raises:
            WeightsError: if a file is missing or damaged, or the weights do not fit the configuration.
        """
        sizes = read_sizes(folder / "model.yaml")
        converted = folder / "last.safetensors"
        path = converted if converted.exists() else folder / "last.ckpt"
        names = vqgan_names(len(sizes["multipliers"]))
        return filled(lambda: cls(**sizes), load_state(path), names, path, _TRAINING_ONLY)


def read_sizes(path: Path) -> dict[str, Any]:
    """Arguments of :class:`VQGAN` from taming's ``model.yaml``.

    Raises:
        WeightsError: if the file is missing, is not YAML, lacks a size, or describes an unsupported variant.
    """
    try:
        params = yaml.safe_load(path.read_text())["model"]["params"]
        config = params["ddconfig"]
        levels = [config["resolution"] >> level for level in range(len(config["ch_mult"]))]
        sizes = {
            "codebook_size": params["n_embed"],
            "code_width": params["embed_dim"],
            "latent_width": config["z_channels"],
            "width": config["ch"],
            "multipliers": config["ch_mult"],
            "num_blocks": config["num_res_blocks"],
            "attention_levels": [  # taming ignores resolutions that no level has
                levels.index(resolution) for resolution in config["attn_resolutions"] if resolution in levels
            ],
        }
        fixed = {name: config[name] for name in ("double_z", "in_channels", "out_ch")}
    except FileNotFoundError as error:
        raise WeightsError(f"{path}: no such file; it belongs beside last.ckpt") from error
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise WeightsError(
            f"{path}: expected model.params with n_embed, embed_dim and ddconfig of a taming VQModel "
            f"({type(error).__name__}: {error})"
        ) from error
    if fixed != {"double_z": False, "in_channels": 3, "out_ch": 3}:
        raise WeightsError(f"{path}: expected double_z false, in_channels 3 and out_ch 3, got {fixed}")
    return sizes


def vqgan_names(num_levels: int) -> Names:
    """Names of taming's VQGAN and of diffusers' model within :class:`VQGAN`."""
    return Names((theirs, f"model.{ours}") for theirs, ours in taming_pairs(num_levels))
