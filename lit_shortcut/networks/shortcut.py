"""The shortcut network: features and the tokens just committed in, the next step's features out (arXiv 2602.23996)."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from lit_shortcut.networks.attention import Attention, feed_forward
from lit_shortcut.weights import load_module

_FREQUENCIES = 128  # half of the sinusoidal embedding's 256 values
_MAX_PERIOD = 10_000.0
_TIME_SCALE = 1000.0  # masked share in [0, 1] to the range the embedding's periods are made for
_LAST_EPS = 1e-12


class Block(nn.Module):
    """Cross-attention to the control tokens, MLP, self-attention, MLP, each with a residual.

    Only queries are normed: the control tokens enter as they are, and so do keys and values of the self-attention.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.cross_norm, self.cross_attention = nn.LayerNorm(width), Attention(width, num_heads)
        self.cross_mlp_norm, self.cross_mlp = nn.LayerNorm(width), feed_forward(width, 4 * width)
        self.self_norm, self.self_attention = nn.LayerNorm(width), Attention(width, num_heads)
        self.self_mlp_norm, self.self_mlp = nn.LayerNorm(width), feed_forward(width, 4 * width)

    def forward(self, x: Tensor, control: Tensor, is_real: Tensor | None) -> Tensor:
        """(B, S, c) to (B, S, c) under ``control`` (B, K, c), padding where ``is_real`` (B, K) is false."""
        x = x + self.cross_attention(self.cross_norm(x), control, is_real)
        x = x + self.cross_mlp(self.cross_mlp_norm(x))
        x = x + self.self_attention(self.self_norm(x), x)
        refined: Tensor = x + self.self_mlp(self.self_mlp_norm(x))
        return refined


class ShortcutNet(nn.Module):
    """Average velocity of the features over one step: f + S(f, control, r). Knows no base.

    With a bottleneck the last projection starts at zero, so that an untrained network repeats its input and training
    begins at "hold"; at ratio 1 there is none.

    Args:
        width: C, width of the base's features.
        num_heads: attention heads.
        bottleneck_ratio: C over the network's own width c, at least 1; at 1 there are no projections.
        num_blocks: blocks in a row.
        uses_time: condition on the masked share r.

    Raises:
        ValueError: if the ratio is below 1 or c is not a multiple of ``num_heads``.
    """

    def __init__(
        self,
        width: int,
        num_heads: int = 16,
        bottleneck_ratio: float = 2.0,
        num_blocks: int = 1,
        uses_time: bool = True,
    ) -> None:
        super().__init__()
        if bottleneck_ratio < 1:
            raise ValueError(f"bottleneck_ratio must be at least 1, got {bottleneck_ratio}")
        self.hparams = {
            "width": width,
            "num_heads": num_heads,
            "bottleneck_ratio": bottleneck_ratio,
            "num_blocks": num_blocks,
            "uses_time": uses_time,
        }
        inner = int(width / bottleneck_ratio)
        narrows = bottleneck_ratio > 1
        self.narrow_features = nn.Linear(width, inner) if narrows else nn.Identity()
        self.narrow_control = nn.Linear(width, inner) if narrows else nn.Identity()
        self.blocks = nn.ModuleList(Block(inner, num_heads) for _ in range(num_blocks))
        self.last = nn.Sequential(
            nn.LayerNorm(inner, eps=_LAST_EPS),
            nn.Linear(inner, inner),
            nn.GELU(),
            nn.LayerNorm(inner, eps=_LAST_EPS),
        )
        if uses_time:
            hidden = round(math.sqrt(2 * _FREQUENCIES * inner))
            self.time_mlp = nn.Sequential(nn.Linear(2 * _FREQUENCIES, hidden), nn.SiLU(), nn.Linear(hidden, inner))
            self.modulation = nn.Linear(inner, 2 * inner)
        self.uses_time = uses_time
        self.widen = nn.Linear(inner, width) if narrows else nn.Identity()
        for parameter in self.widen.parameters():
            nn.init.zeros_(parameter)

    @classmethod
    def load(cls, path: Path) -> ShortcutNet:
        """The network stored at ``path``, frozen; raises :class:`~lit_shortcut.weights.WeightsError` if it is none."""
        return load_module(cls, path)

    def forward(self, features: Tensor, control: Tensor, masked_share: Tensor, is_real: Tensor | None = None) -> Tensor:
        """Next features (B, S, C).

        Args:
            features: (B, S, C) of the present step.
            control: (B, K, C) embeddings of the tokens just committed.
            masked_share: (B,) r, share of image tokens still masked before the step that is predicted.
            is_real: (B, K), false where ``control`` is padding.
        """
        x, narrow_control = self.narrow_features(features), self.narrow_control(control)
        for block in self.blocks:
            x = block(x, narrow_control, is_real)
        x = self.last(x)
        if self.uses_time:
            time = self.time_mlp(sinusoids(masked_share).to(x.dtype))
            scale, shift = self.modulation(time)[:, None].chunk(2, dim=-1)
            x = x * (1 + scale) + shift
        velocity: Tensor = self.widen(x)
        return features + velocity


def sinusoids(share: Tensor) -> Tensor:
    """Cosines, then sines, of 1000·``share`` (B,) at geometric frequencies: (B, 256)."""
    exponents = torch.arange(_FREQUENCIES, device=share.device) / _FREQUENCIES
    angles = _TIME_SCALE * share.float()[:, None] * _MAX_PERIOD**-exponents
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
