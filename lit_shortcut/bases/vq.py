"""Image decoder that many bases share: the ``VQModel`` of diffusers."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import VQModel
from torch import Tensor

from lit_shortcut.bases.frozen import grid_of
from lit_shortcut.bases.saved import DIFFUSERS, Variant, build, read_weights, take
from lit_shortcut.bounds import require_at_least
from lit_shortcut.precision import KeptDtype
from lit_shortcut.weights import WeightsError


class VQDecoder(KeptDtype):
    """Frozen decoder from codes on a grid to images.

    Args:
        vqvae: the model; its encoder is not used.
        height: rows of the token grid.
        width: tokens in a row.
        chunk: images decoded at once.
    """

    def __init__(self, vqvae: VQModel, height: int, width: int, chunk: int = 8) -> None:
        super().__init__()
        require_at_least(1, height=height, width=width, chunk=chunk)
        self.vqvae, self.height, self.width, self.chunk = vqvae, height, width, chunk
        self.eval().requires_grad_(False)

    @classmethod
    def load(cls, folder: Path, height: int, width: int, variant: Variant | None = None) -> VQDecoder:
        """Load the decoding half, in float32, of the model that diffusers saved to ``folder``.

        Raises:
            WeightsError: if a file is missing or damaged, or tensors are missing, unknown or misshapen.
        """
        return cls(load_vqvae(folder, variant), height, width)

    @property
    def codebook_size(self) -> int:
        """V, number of codes."""
        size: int = self.vqvae.config.num_vq_embeddings
        return size

    @torch.inference_mode()
    def decode(self, tokens: Tensor) -> Tensor:
        """Images, uint8 (B, 3, H, W), of codes ``tokens`` (B, L), row by row."""
        chunks = tokens.split(self.chunk)
        return torch.cat([(self.pixels(chunk).clamp(0, 1) * 255).round().byte() for chunk in chunks])

    def pixels(self, tokens: Tensor) -> Tensor:
        """Images (B, 3, H, W), float32 and about in [0, 1], of codes ``tokens`` (B, L), row by row."""
        vqvae = self.vqvae
        if vqvae.dtype == torch.float16:  # which overflows in some layers
            vqvae = vqvae.float()
        codes = vqvae.quantize.embedding(tokens.unflatten(1, (self.height, self.width))).permute(0, 3, 1, 2)
        by = codes if vqvae.config.norm_type == "spatial" else None
        pixels: Tensor = vqvae.decoder(vqvae.post_quant_conv(codes), by).float()
        return pixels


def load_vqvae(folder: Path, variant: Variant | None = None, codebook_size: int | None = None) -> VQModel:
    """Load the model that diffusers saved to ``folder``, in float32 and without its encoder.

    Raises:
        WeightsError: if a file is missing or damaged, tensors are missing, unknown or misshapen, or there are not
            ``codebook_size`` codes (None takes any number).
    """
    vqvae = build(VQModel, folder)
    found = vqvae.config.num_vq_embeddings
    if codebook_size not in (None, found):
        raise WeightsError(f"{folder}: expected the {codebook_size} codes that the transformer draws, found {found}")
    del vqvae.encoder, vqvae.quant_conv
    take(vqvae, read_weights(folder, DIFFUSERS, variant), folder, but_for=("encoder.", "quant_conv."))
    return vqvae


def random_vqvae() -> VQModel:
    """Make a model of the sizes that aMUSEd, Meissonic and Lumina-DiMOO share, with random weights and no encoder."""
    widths = (128, 256, 256, 512, 768)
    vqvae = VQModel(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=2,
        latent_channels=64,
        num_vq_embeddings=8192,
        mid_block_add_attention=False,
        lookup_from_codebook=True,
    )
    del vqvae.encoder, vqvae.quant_conv
    return vqvae


def decoder_of(vqvae: VQModel, height: int | None, width: int | None, default: int) -> tuple[VQDecoder, dict[str, int]]:
    """Return the decoder to images of ``height`` × ``width`` pixels, and these sizes with the patch size for its base.

    Args:
        vqvae: the model.
        height: height of the images in pixels; None takes ``default``.
        width: width of the images in pixels, likewise.
        default: side of the images in pixels.

    Raises:
        ValueError: if height or width is not a positive multiple of the patch size.
    """
    height, width = (default if size is None else size for size in (height, width))
    patch = patch_size(vqvae)
    decoder = VQDecoder(vqvae, *grid_of(height, width, patch))
    return decoder, {"height": height, "width": width, "patch_size": patch}


def patch_size(vqvae: VQModel) -> int:
    """Side in pixels of the square that a token of ``vqvae`` stands for."""
    return 2 ** (len(vqvae.config.block_out_channels) - 1)
