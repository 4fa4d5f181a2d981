"""Lumina-DiMOO's image decoder: the ``VQModel`` of diffusers in the checkpoint's folder ``vqvae``."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import VQModel
from torch import Tensor, nn

from lit_shortcut.weights import WeightsError


class VQDecoder(nn.Module):
    """Codes on a grid to images, frozen.

    Args:
        vqvae: looks codes up itself (``lookup_from_codebook``).
        height: rows of the token grid.
        width: tokens in a row.
    """

    def __init__(self, vqvae: VQModel, height: int, width: int) -> None:
        super().__init__()
        self.vqvae, self.height, self.width = vqvae, height, width
        self.eval().requires_grad_(False)

    @classmethod
    def load(cls, folder: Path, height: int, width: int) -> VQDecoder:
        """The model that diffusers saved to ``folder``.

        Raises:
            WeightsError: if the folder is missing, or holds no such model.
        """
        if not (folder / "config.json").is_file():
            raise WeightsError(f"{folder}/config.json: no such file; expected a VQModel that diffusers saved")
        try:
            # codes are looked up whatever the saved configuration says
            vqvae = VQModel.from_pretrained(folder, low_cpu_mem_usage=False, lookup_from_codebook=True)
        except (OSError, ValueError, TypeError, RuntimeError) as error:
            raise WeightsError(f"{folder}: not a VQModel that diffusers saved ({error})") from error
        return cls(vqvae, height, width)

    @property
    def codebook_size(self) -> int:
        """V, number of codes."""
        size: int = self.vqvae.config.num_vq_embeddings
        return size

    @torch.inference_mode()
    def decode(self, tokens: Tensor) -> Tensor:
        """Images, uint8 (B, 3, H, W), of codes ``tokens`` (B, L), row by row."""
        codes = tokens.unflatten(1, (self.height, self.width))
        shape = (*codes.shape, self.vqvae.quantize.embedding.embedding_dim)
        pixels = self.vqvae.decode(codes, force_not_quantize=True, shape=shape).sample
        return (pixels.float().clamp(0, 1) * 255).round().byte()
