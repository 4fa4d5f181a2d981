"""Meissonic and Monetico as published: with weights from their folders, or at their sizes with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from lit_shortcut.bases.clip_text import CLIPText
from lit_shortcut.bases.frozen import seeded
from lit_shortcut.bases.meissonic.adapter import NEGATIVE, Meissonic
from lit_shortcut.bases.meissonic.transformer import MeissonicTransformer
from lit_shortcut.bases.saved import (
    DIFFUSERS,
    TRANSFORMERS,
    Variant,
    file_patterns,
    read_json,
    read_weights,
    take,
)
from lit_shortcut.bases.vq import decoder_of, load_vqvae, random_vqvae
from lit_shortcut.hub import local_folder
from lit_shortcut.weights import Precision, WeightsError

Resolution = Literal[512, 1024]

_SIZES = (
    "num_layers",
    "num_single_layers",
    "attention_head_dim",
    "num_attention_heads",
    "joint_attention_dim",
    "pooled_projection_dim",
    "vocab_size",
    "codebook_size",
)
_DEFAULT_PIXELS = {1: 512, 2: 1024}  # by the transformer's stride


def published(
    source: str,
    *,
    height: int | None = None,
    width: int | None = None,
    negative: str = NEGATIVE,
    text_encoder: str | None = None,
    variant: Variant | None = None,
    dtype: Precision = "bfloat16",
) -> Meissonic:
    """The base with published weights.

    Args:
        source: folder, or address on the hub: ``hf://MeissonFlow/Meissonic``, ``hf://Collov-Labs/Monetico``.
        height: height of the images in pixels; None takes 1024 if the transformer resamples (Meissonic), else 512.
        width: width of the images in pixels, likewise.
        negative: prompt of the unconditional branch.
        text_encoder: folder or address of a text encoder, or a whole CLIP, to use instead of the source's own.
            Meissonic's scripts load ``hf://laion/CLIP-ViT-H-14-laion2B-s32B-b79K``, Monetico's the source's own.
        variant: ``fp16`` takes the source's files in half precision.
        dtype: dtype of transformer and text encoder; the image decoder runs in float32. Meissonic's time is rounded to
            it.

    Raises:
        WeightsError: if a file is unavailable, damaged, or does not fit the others.
        ValueError: if height or width does not fit the transformer.
    """
    patterns = [*file_patterns("transformer", DIFFUSERS, variant), *file_patterns("vqvae", DIFFUSERS, variant)]
    own_text = file_patterns("text_encoder", TRANSFORMERS, variant) if text_encoder is None else []
    folder, own_dtype = local_folder(source, [*patterns, *own_text, "tokenizer/*"]), getattr(torch, dtype)
    transformer = load_transformer(folder / "transformer", variant, own_dtype)
    vqvae = load_vqvae(folder / "vqvae", variant, transformer.codebook_size)
    widths = (transformer.hparams["joint_attention_dim"], transformer.hparams["pooled_projection_dim"])
    text_folder = folder / "text_encoder"
    if text_encoder is not None:
        text_folder, variant = local_folder(text_encoder, file_patterns("", TRANSFORMERS, None)), None
    text = CLIPText.load(text_folder, folder / "tokenizer", variant, own_dtype, widths)
    decoder, sizes = decoder_of(vqvae, height, width, _DEFAULT_PIXELS[transformer.stride])
    return Meissonic(transformer, decoder, text, negative=negative, **sizes)


def random_weights(
    resolution: Resolution = 1024,
    *,
    depth: int = 14,
    single_depth: int = 28,
    text_depth: int = 24,
    dtype: Precision = "bfloat16",
    seed: int = 0,
) -> Meissonic:
    """The base at published sizes with random weights: for latency and memory, never for quality.

    Its fingerprint begins with ``random-``. Text tokens are the bytes of a prompt.

    Args:
        resolution: side of the images in pixels: 1024 is Meissonic, 512 Monetico.
        depth: blocks of two streams.
        single_depth: blocks of one stream.
        text_depth: layers of the text encoder.
        dtype: dtype of transformer and text encoder.
        seed: seed of the weights.
    """
    own_dtype, resampled = getattr(torch, dtype), resolution != _DEFAULT_PIXELS[1]
    with seeded(seed):
        transformer = MeissonicTransformer(depth, single_depth, downsample=resampled, upsample=resampled)
        text = CLIPText.random(1024, text_depth, num_heads=16, activation="gelu", dtype=own_dtype)
        vqvae = random_vqvae()
    decoder, sizes = decoder_of(vqvae, None, None, resolution)
    base = Meissonic(transformer.to(own_dtype), decoder, text, negative=NEGATIVE, **sizes)
    base.label = "random-"
    return base


def load_transformer(
    folder: Path, variant: Variant | None = None, dtype: torch.dtype = torch.float32
) -> MeissonicTransformer:
    """The frozen transformer of the checkpoint in ``folder``; weights stored in ``dtype`` are mapped from the files.

    Raises:
        WeightsError: if a file is missing or damaged, or tensors are missing, unknown or misshapen; all are named.
    """
    path = folder / "config.json"
    sizes = read_sizes(path)
    try:
        with torch.device("meta"):
            transformer = MeissonicTransformer(**sizes).to(dtype)
    except ValueError as error:
        raise WeightsError(f"{path}: {error}") from error
    take(transformer, read_weights(folder, DIFFUSERS, variant, dtype), folder)
    return transformer


def read_sizes(path: Path) -> dict[str, Any]:
    """Arguments of :class:`MeissonicTransformer` in the checkpoint's ``config.json`` at ``path``.

    Raises:
        WeightsError: if the file is missing or damaged, lacks a size, or describes a variant that is not implemented.
    """
    config = read_json(path)
    if config.get("guidance_embeds"):
        raise WeightsError(f"{path}: guidance_embeds: expected false, found {config['guidance_embeds']!r}")
    sizes: dict[str, Any] = {name: config.get(name) for name in _SIZES}
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise WeightsError(f"{path}: {name}: expected a whole number, found {value!r}")
    axes = config.get("axes_dims_rope")
    if not isinstance(axes, list) or not all(type(axis) is int for axis in axes):
        raise WeightsError(f"{path}: axes_dims_rope: expected whole numbers, found {axes!r}")
    resampling = {name: config.get(name, False) for name in ("downsample", "upsample")}
    for name, value in resampling.items():
        if not isinstance(value, bool):
            raise WeightsError(f"{path}: {name}: expected a bool, found {value!r}")
    return sizes | {"axes_dims_rope": axes} | resampling
