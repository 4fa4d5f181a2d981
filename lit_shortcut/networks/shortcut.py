"""The shortcut network: features and the tokens just committed in, the next step's features out (arXiv 2602.23996)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_shortcut.interface import Places
from lit_shortcut.networks.attention import Attention, feed_forward
from lit_shortcut.networks.neighbourhood import Neighbourhood
from lit_shortcut.published import SHORTCUT, fill, load_state
from lit_shortcut.weights import WeightsError, load_module

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


class VelocityNet(nn.Module, ABC):
    """What all shortcut networks share: average velocity of the features over one step, f + S(f, control, r).

    Projections to a width of its own, blocks, a last layer, modulation by the masked share, projection back. Knows no
    base. With a bottleneck the last projection starts at zero, so that an untrained network repeats its input and
    training begins at "hold"; at ratio 1 there are no projections.

    Args:
        width: C, width of the base's features.
        bottleneck_ratio: C over the network's own width c, at least 1.
        uses_time: condition on the masked share r.
        make_blocks: from c to the blocks that :meth:`refine` goes through.
        make_last: from c to the layer behind them.

    Raises:
        ValueError: if the ratio is below 1.
    """

    uses_places: ClassVar[bool] = False
    """Whether the network needs to know where rows stand in the base's sequence."""

    hparams: dict[str, Any]

    def __init__(
        self,
        width: int,
        bottleneck_ratio: float,
        uses_time: bool,
        make_blocks: Callable[[int], nn.ModuleList],
        make_last: Callable[[int], nn.Module],
    ) -> None:
        super().__init__()
        if bottleneck_ratio < 1:
            raise ValueError(f"bottleneck_ratio must be at least 1, got {bottleneck_ratio}")
        inner = int(width / bottleneck_ratio)
        narrows = bottleneck_ratio > 1
        self.narrow_features = nn.Linear(width, inner) if narrows else nn.Identity()
        self.narrow_control = nn.Linear(width, inner) if narrows else nn.Identity()
        self.blocks = make_blocks(inner)
        self.last = make_last(inner)
        if uses_time:
            hidden = round(math.sqrt(2 * _FREQUENCIES * inner))
            self.time_mlp = nn.Sequential(nn.Linear(2 * _FREQUENCIES, hidden), nn.SiLU(), nn.Linear(hidden, inner))
            self.modulation = nn.Linear(inner, 2 * inner)
        self.uses_time = uses_time
        self.widen = nn.Linear(inner, width) if narrows else nn.Identity()
        for parameter in self.widen.parameters():
            nn.init.zeros_(parameter)

    def forward(
        self,
        features: Tensor,
        control: Tensor,
        masked_share: Tensor,
        is_real: Tensor | None = None,
        places: Places | None = None,
    ) -> Tensor:
        """Next features (B, S, C).

        Args:
            features: (B, S, C) of the present step.
            control: (B, K, C) embeddings of the tokens just committed.
            masked_share: (B,) r, share of image tokens still masked before the step that is predicted.
            is_real: (B, K), false where ``control`` is padding.
            places: where ``features`` and ``control`` stand in the base's sequence, if the network uses that.
        """
        x = self.refine(self.narrow_features(features), self.narrow_control(control), is_real, places)
        x = self.last(x)
        if self.uses_time:
            time = self.time_mlp(sinusoids(masked_share).to(x.dtype))
            scale, shift = self.modulation(time)[:, None].chunk(2, dim=-1)
            x = x * (1 + scale) + shift
        velocity: Tensor = self.widen(x)
        return features + velocity

    @abstractmethod
    def refine(self, x: Tensor, control: Tensor, is_real: Tensor | None, places: Places | None) -> Tensor:
        """Blocks over ``x`` (B, S, c) under ``control`` (B, K, c), padding where ``is_real`` (B, K) is false."""


class ShortcutNet(VelocityNet):
    """The shortcut network of MaskGIT: layer norms, attention without positions.

    Args:
        width: C, width of the base's features.
        num_heads: attention heads.
        bottleneck_ratio: C over the network's own width c, at least 1; at 1 there are no projections.
        num_blocks: blocks in a row, at least 1.
        uses_time: condition on the masked share r.
        grid: side of the square token grid, for the neighbourhood.
        reach: of the :class:`~lit_shortcut.networks.neighbourhood.Neighbourhood` that is added before the blocks; 0
            leaves it out, as published.
        stride: tokens a side of the square that a row of the features stands for, for the neighbourhood.

    Raises:
        ValueError: if the ratio or the number of blocks is below 1 or c is not a multiple of ``num_heads``.
    """

    def __init__(
        self,
        width: int,
        num_heads: int = 16,
        bottleneck_ratio: float = 2.0,
        num_blocks: int = 1,
        uses_time: bool = True,
        grid: int = 0,
        reach: int = 0,
        stride: int = 1,
    ) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks must be at least 1, got {num_blocks}")
        super().__init__(
            width,
            bottleneck_ratio,
            uses_time,
            make_blocks=lambda inner: nn.ModuleList(Block(inner, num_heads) for _ in range(num_blocks)),
            make_last=lambda inner: nn.Sequential(
                nn.LayerNorm(inner, eps=_LAST_EPS),
                nn.Linear(inner, inner),
                nn.GELU(),
                nn.LayerNorm(inner, eps=_LAST_EPS),
            ),
        )
        self.hparams = {
            "width": width,
            "num_heads": num_heads,
            "bottleneck_ratio": bottleneck_ratio,
            "num_blocks": num_blocks,
            "uses_time": uses_time,
            "grid": grid,
            "reach": reach,
            "stride": stride,
        }
        inner = int(width / bottleneck_ratio)
        self.neighbourhood = Neighbourhood(inner, grid, reach, stride) if reach else None

    @classmethod
    def load(cls, path: Path) -> ShortcutNet:
        """The network stored at ``path``, frozen; raises :class:`~lit_shortcut.weights.WeightsError` if it is none."""
        return load_module(cls, path)

    @classmethod
    def load_published(cls, path: Path, num_heads: int = 16) -> ShortcutNet:
        """The network whose published state dict is at ``path``, frozen.

        Width, bottleneck, blocks and time embedding are read off its tensors; the number of heads leaves no trace in
        them.

        Raises:
            WeightsError: if the file is missing, damaged, or holds something else.
        """
        state = load_state(path)
        try:
            sizes = published_sizes(state, inner=len(state["last_layer.1.weight"]))
            with torch.device("meta"):
                network = cls(num_heads=num_heads, **sizes)
        except (KeyError, IndexError) as error:
            raise WeightsError(
                f"{path}: expected a MIGM-Shortcut state dict with last_layer.1.weight and, where it has a bottleneck, "
                f"proj_in.weight (c, C); found {', '.join(sorted(state)[:8])}, …"
            ) from error
        except ValueError as error:
            raise WeightsError(f"{path}: {error}") from error
        fill(network, state, SHORTCUT, path)
        return network

    def refine(self, x: Tensor, control: Tensor, is_real: Tensor | None, places: Places | None) -> Tensor:
        """Blocks over ``x`` (B, S, c) under ``control`` (B, K, c), whose ``places`` the neighbourhood alone asks for.

        Raises:
            ValueError: if there is a neighbourhood and no ``places``.
        """
        if self.neighbourhood is not None:
            if places is None:
                raise ValueError("a ShortcutNet with a reach needs the places of its control tokens")
            near = self.neighbourhood(control, places.control, is_real)
            x = x + F.pad(near, (0, 0, 0, x.shape[1] - near.shape[1]))
        for block in self.blocks:
            x = block(x, control, is_real)
        return x


def published_sizes(state: dict[str, Tensor], inner: int) -> dict[str, Any]:
    """Arguments of any :class:`VelocityNet` of own width ``inner`` (c), read off its published ``state``."""
    width = state["proj_in.weight"].shape[1] if "proj_in.weight" in state else inner
    ratio = width / inner
    return {
        "width": width,
        # the division may round below inner
        "bottleneck_ratio": ratio if int(width / ratio) == inner else math.nextafter(ratio, 1),
        "num_blocks": len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
        "uses_time": "time_embedder.mlp.0.weight" in state,
    }


def sinusoids(share: Tensor) -> Tensor:
    """Cosines, then sines, of 1000·``share`` (B,) at geometric frequencies: (B, 256)."""
    exponents = torch.arange(_FREQUENCIES, dtype=torch.float32, device=share.device) / _FREQUENCIES
    angles = _TIME_SCALE * share.float()[:, None] * _MAX_PERIOD**-exponents
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
