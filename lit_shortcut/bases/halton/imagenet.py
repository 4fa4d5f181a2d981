"""Halton-MaskGIT for ImageNet as published (llvictorll/Halton-Maskgit): with its weights or with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from lit_shortcut.bases.frozen import seeded
from lit_shortcut.bases.halton.llamagen import llamagen_decoder, load_llamagen
from lit_shortcut.bases.halton.transformer import HaltonTransformer, swiglu_width
from lit_shortcut.bases.maskgit.adapter import MaskGIT
from lit_shortcut.hub import local_file
from lit_shortcut.inputs import located

Size = Literal["tiny", "small", "base", "large", "xlarge"]
Resolution = Literal[256, 384]
SIZES: dict[Size, dict[str, int]] = {
    "tiny": {"width": 384, "depth": 6, "num_heads": 6},
    "small": {"width": 512, "depth": 12, "num_heads": 6},
    "base": {"width": 768, "depth": 12, "num_heads": 12},
    "large": {"width": 1024, "depth": 24, "num_heads": 16},
    "xlarge": {"width": 1152, "depth": 28, "num_heads": 16},
}
PATCH_SIZE = 16


def published(source: str, vq: str, size: Size = "large", resolution: Resolution = 384) -> MaskGIT:
    """The base with published weights.

    Files converted by :mod:`lit_shortcut.convert`, with the ending ``.safetensors``, take precedence in a folder.

    Args:
        source: folder of ``ImageNet_<resolution>_<size>.pth``, or ``hf://llvictorll/Halton-Maskgit``.
        vq: folder of LlamaGen's ``vq_ds16_c2i.pt``, or ``hf://FoundationVision/LlamaGen``.
        size: size of the transformer.
        resolution: side of the images in pixels.

    Raises:
        WeightsError: if a file is unavailable, damaged, or of other sizes.
    """
    transformer = _file(source, f"ImageNet_{resolution}_{size}.pth")
    decoder = load_llamagen(_file(vq, "vq_ds16_c2i.pt"))
    return MaskGIT(HaltonTransformer.load_published(transformer, **imagenet_sizes(size, resolution)), decoder)


def random_weights(size: Size = "large", resolution: Resolution = 384, seed: int = 0) -> MaskGIT:
    """The base at published sizes with random weights: for latency and tests, never for quality.

    Its fingerprint begins with ``random-``, also in cards and result rows.
    """
    with seeded(seed):
        base = MaskGIT(HaltonTransformer(**imagenet_sizes(size, resolution)), llamagen_decoder())
    base.label = "random-"
    return base


def imagenet_sizes(size: Size, resolution: Resolution) -> dict[str, Any]:
    """Arguments of :class:`HaltonTransformer`.

    Raises:
        ValueError: if there is no such size or resolution.
    """
    if size not in SIZES or resolution not in (256, 384):
        raise ValueError(
            f"expected one of the sizes {', '.join(SIZES)} at resolution 256 or 384, got {size!r} at {resolution!r}"
        )
    return {
        "codebook_size": 16384,
        "num_classes": 1000,
        "grid": resolution // PATCH_SIZE,
        "mlp_width": swiglu_width(SIZES[size]["width"]),
    } | SIZES[size]


def _file(source: str, name: str) -> Path:
    """Return the file ``name`` of ``source``, or what ``lit_shortcut.convert`` wrote beside it."""
    file = local_file(f"{source}/{name}") if source.startswith("hf://") else located(Path(source) / name)
    converted = located(file.with_suffix(".safetensors"))
    return converted if converted.exists() else file
