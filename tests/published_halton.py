"""Halton-MaskGIT's files in the published form, narrow and shallow, of the true numbers of codes and classes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lit_shortcut.bases.halton import imagenet, llamagen
from lit_shortcut.bases.halton.llamagen import llamagen_decoder
from lit_shortcut.bases.halton.transformer import NAMES, HaltonTransformer

WIDTH = 16


def shrink(patch: pytest.MonkeyPatch, size: imagenet.Size) -> None:
    """Make ``size`` and the decoder tiny; heads of the transformer do not divide its width."""
    patch.setitem(imagenet.SIZES, size, {"width": WIDTH, "depth": 1, "num_heads": 3})
    for name, value in (("width", 32), ("multipliers", [1, 1]), ("num_blocks", [1, 1]), ("latent_width", 4)):
        patch.setitem(llamagen._SIZES, name, value)


def published_state(network: HaltonTransformer) -> dict[str, Tensor]:
    """``network``'s tensors under their published names, the tied head with them."""
    state = {NAMES.published(name): tensor for name, tensor in network.state_dict().items()}
    return {"head.weight": state["tok_emb.weight"]} | state


def make_release(folder: Path, size: imagenet.Size, *resolutions: imagenet.Resolution) -> None:
    """Write transformers of ``size``, one for each of ``resolutions``, and the image decoder to ``folder``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        networks = {at: HaltonTransformer(**imagenet.imagenet_sizes(size, at)) for at in resolutions}
        decoder = llamagen_decoder()
    for resolution, network in networks.items():
        state = {f"module.{name}": tensor for name, tensor in published_state(network).items()}
        torch.save({"model_state_dict": state, "iter": 1, "epoch": 2}, folder / f"ImageNet_{resolution}_{size}.pth")
    state = {llamagen.NAMES.published(name): tensor for name, tensor in decoder.state_dict().items()}
    state |= {"encoder.conv_in.weight": torch.ones(1), "quant_conv.bias": torch.ones(1)}
    torch.save({"model": state | {"quantize.codebook_used": torch.zeros(65536)}}, folder / "vq_ds16_c2i.pt")
