"""MaskGIT for ImageNet as published (llvictorll/Maskgit-pytorch): with its weights, or with random weights."""

from __future__ import annotations

from typing import Literal

from lit_shortcut.bases.frozen import seeded
from lit_shortcut.bases.maskgit.adapter import MaskGIT
from lit_shortcut.bases.maskgit.transformer import MaskGITTransformer
from lit_shortcut.bases.maskgit.vqgan import load_vqgan, vqgan_decoder
from lit_shortcut.hub import local_file

Size = Literal["base", "big", "huge"]
SIZES: dict[Size, dict[str, int]] = {
    "base": {"width": 768, "depth": 24},
    "big": {"width": 1024, "depth": 32},
    "huge": {"width": 1024, "depth": 48},
}


def published(transformer: str, vqgan: str, grid: int = 32, size: Size = "base") -> MaskGIT:
    """The base with published weights.

    Args:
        transformer: checkpoint of the transformer, a path or an ``hf://`` address.
        vqgan: folder of the VQGAN's ``last.ckpt`` and ``model.yaml``, a path or an ``hf://`` address.
        grid: side of the token grid: 32 at 512×512 pixels, 16 at 256×256.
        size: size of the transformer.

    Raises:
        WeightsError: if a file is unavailable, damaged, or of other sizes.
        ValueError: if there is no such size.
    """
    sizes = imagenet_sizes(grid, size)  # before anything is downloaded
    file = local_file(transformer)
    local_file(f"{vqgan}/last.ckpt")
    folder = local_file(f"{vqgan}/model.yaml").parent
    decoder = load_vqgan(folder)
    return MaskGIT(MaskGITTransformer.load_published(file, **sizes), decoder)


def random_weights(grid: int = 32, size: Size = "base", seed: int = 0) -> MaskGIT:
    """The base at published sizes with random weights: for latency and tests, never for quality.

    Its fingerprint begins with ``random-``, also in cards and result rows.
    """
    with seeded(seed):
        base = MaskGIT(MaskGITTransformer(**imagenet_sizes(grid, size)), vqgan_decoder())
    base.label = "random-"
    return base


def imagenet_sizes(grid: int, size: Size) -> dict[str, int]:
    """Arguments of :class:`MaskGITTransformer`.

    Raises:
        ValueError: if there is no such size.
    """
    if size not in SIZES:
        raise ValueError(f"size must be one of {', '.join(SIZES)}; got {size!r}")
    return {"codebook_size": 1024, "num_classes": 1000, "grid": grid, "num_heads": 16, "mlp_width": 3072} | SIZES[size]
