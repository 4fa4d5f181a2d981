"""The decoder of taming-transformers' VQGAN by its formulas, straight from a state dict: a reference for ours."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import yaml
from torch import Tensor
from torch.nn import functional as F


class Sizes(NamedTuple):
    """As in taming's ``ddconfig``, with codebook size and code width."""

    n_embed: int
    embed_dim: int
    z_channels: int
    ch: int
    ch_mult: list[int]
    num_res_blocks: int
    resolution: int
    attn_resolutions: list[int]


class Reference:
    """Decoder whose tensors ``weights`` holds under taming's names."""

    def __init__(self, weights: dict[str, Tensor], sizes: Sizes) -> None:
        self.w, self.sizes = weights, sizes

    def decode(self, ids: Tensor) -> Tensor:
        """Images (B, 3, H, W) of codes ``ids`` (B, h, w)."""
        z = self.w["quantize.embedding.weight"][ids].movedim(-1, 1)
        h = self.middle(self.conv(self.conv(z, "post_quant_conv"), "decoder.conv_in"))
        for level in reversed(range(len(self.sizes.ch_mult))):
            own = [name for name in self.w if name.startswith(f"decoder.up.{level}.") and name.endswith("conv1.bias")]
            for block in range(len(own)):  # what a level has, since some decoders have a number for each
                h = self.level_block(h, f"decoder.up.{level}", level, block)
            if level:
                h = h.repeat_interleave(2, -1).repeat_interleave(2, -2)
                h = self.conv(h, f"decoder.up.{level}.upsample.conv")
        return self.conv(self.swish_norm(h, "decoder.norm_out"), "decoder.conv_out")

    def level_block(self, h: Tensor, name: str, level: int, block: int) -> Tensor:
        h = self.residual(h, f"{name}.block.{block}")
        has_attention = self.sizes.resolution >> level in self.sizes.attn_resolutions
        return self.attention(h, f"{name}.attn.{block}") if has_attention else h

    def middle(self, h: Tensor) -> Tensor:
        h = self.attention(self.residual(h, "decoder.mid.block_1"), "decoder.mid.attn_1")
        return self.residual(h, "decoder.mid.block_2")

    def residual(self, x: Tensor, name: str) -> Tensor:
        h = self.conv(self.swish_norm(x, f"{name}.norm1"), f"{name}.conv1")
        h = self.conv(self.swish_norm(h, f"{name}.norm2"), f"{name}.conv2")
        return h + (self.conv(x, f"{name}.nin_shortcut") if f"{name}.nin_shortcut.weight" in self.w else x)

    def attention(self, x: Tensor, name: str) -> Tensor:
        normed = self.norm(x, f"{name}.norm")
        q, k, v = (self.conv(normed, f"{name}.{part}").flatten(2) for part in "qkv")
        weights = torch.softmax(q.mT @ k / x.shape[1] ** 0.5, dim=-1)
        return x + self.conv((v @ weights.mT).view(x.shape), f"{name}.proj_out")

    def norm(self, x: Tensor, name: str) -> Tensor:
        return F.group_norm(x, 32, self.w[f"{name}.weight"], self.w[f"{name}.bias"], eps=1e-6)

    def swish_norm(self, x: Tensor, name: str) -> Tensor:
        normed = self.norm(x, name)
        return normed * torch.sigmoid(normed)

    def conv(self, x: Tensor, name: str) -> Tensor:
        weight = self.w[f"{name}.weight"]
        return F.conv2d(x, weight, self.w[f"{name}.bias"], padding=weight.shape[-1] // 2)


def write_folder(folder: Path, weights: dict[str, Tensor], sizes: Sizes) -> None:
    """``model.yaml`` and ``last.ckpt`` as taming leaves them, with a tensor of its training loss."""
    config = {"double_z": False, "in_channels": 3, "out_ch": 3, "dropout": 0.0} | sizes._asdict()
    params = {"embed_dim": config.pop("embed_dim"), "n_embed": config.pop("n_embed"), "ddconfig": config}
    folder.mkdir(exist_ok=True)
    (folder / "model.yaml").write_text(yaml.safe_dump({"model": {"params": params}}))
    state = weights | {"loss.discriminator.main.0.weight": torch.ones(3)}
    torch.save({"state_dict": state, "epoch": 3, "global_step": 7}, folder / "last.ckpt")


def random_weights(sizes: Sizes, seed: int) -> dict[str, Tensor]:
    """A state dict under taming's names: numpy's default generator, tensor by tensor in the order written here.

    Norm weights are 1 + N/10; all else is N / √(values that enter one output).
    """
    rng = np.random.default_rng(seed)
    weights: dict[str, Tensor] = {}

    def draw(name: str, *shape: int, around: float = 0.0, scale: float) -> None:
        weights[name] = torch.from_numpy((around + scale * rng.standard_normal(shape)).astype(np.float32))

    def conv(name: str, out: int, entering: int, kernel: int = 3) -> None:
        scale = (entering * kernel**2) ** -0.5
        draw(f"{name}.weight", out, entering, kernel, kernel, scale=scale)
        draw(f"{name}.bias", out, scale=scale)

    def norm(name: str, width: int) -> None:
        draw(f"{name}.weight", width, around=1.0, scale=0.1)
        draw(f"{name}.bias", width, scale=0.1)

    def residual(name: str, entering: int, out: int) -> None:
        norm(f"{name}.norm1", entering)
        conv(f"{name}.conv1", out, entering)
        norm(f"{name}.norm2", out)
        conv(f"{name}.conv2", out, out)
        if entering != out:
            conv(f"{name}.nin_shortcut", out, entering, kernel=1)

    def attention(name: str, width: int) -> None:
        norm(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", width, width, kernel=1)

    def middle(half: str, width: int) -> None:
        residual(f"{half}.mid.block_1", width, width)
        attention(f"{half}.mid.attn_1", width)
        residual(f"{half}.mid.block_2", width, width)

    widths = [sizes.ch * multiplier for multiplier in sizes.ch_mult]
    has_attention = [sizes.resolution >> level in sizes.attn_resolutions for level in range(len(widths))]

    def level_of(name: str, level: int, entering: int, num_blocks: int) -> None:
        for block in range(num_blocks):
            residual(f"{name}.block.{block}", entering if block == 0 else widths[level], widths[level])
            if has_attention[level]:
                attention(f"{name}.attn.{block}", widths[level])

    conv("encoder.conv_in", sizes.ch, 3)
    for level, width in enumerate(widths):
        level_of(f"encoder.down.{level}", level, ([sizes.ch, *widths])[level], sizes.num_res_blocks)
        if level < len(widths) - 1:
            conv(f"encoder.down.{level}.downsample.conv", width, width)
    middle("encoder", widths[-1])
    norm("encoder.norm_out", widths[-1])
    conv("encoder.conv_out", sizes.z_channels, widths[-1])
    conv("quant_conv", sizes.embed_dim, sizes.z_channels, kernel=1)
    draw("quantize.embedding.weight", sizes.n_embed, sizes.embed_dim, scale=1.0)
    conv("post_quant_conv", sizes.z_channels, sizes.embed_dim, kernel=1)
    conv("decoder.conv_in", widths[-1], sizes.z_channels)
    middle("decoder", widths[-1])
    for level in reversed(range(len(widths))):
        level_of(f"decoder.up.{level}", level, ([*widths, widths[-1]])[level + 1], sizes.num_res_blocks + 1)
        if level:
            conv(f"decoder.up.{level}.upsample.conv", widths[level], widths[level])
    norm("decoder.norm_out", sizes.ch * sizes.ch_mult[0])
    conv("decoder.conv_out", 3, sizes.ch * sizes.ch_mult[0])
    return weights
