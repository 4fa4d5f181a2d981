"""Shortcut network: from features and the tokens just committed to the next step's features (arXiv 2602.23996)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_shortcut.bounds import require_at_least
from lit_shortcut.interface import Places
from lit_shortcut.networks.attention import Attention, feed_forward
from lit_shortcut.networks.neighbourhood import ConvBlock, Neighbourhood
from lit_shortcut.networks.rows import ALL_ROWS, Options, RowChoice, Rows
from lit_shortcut.published import Names, fill, load_state
from lit_shortcut.weights import WeightsError, load_module

_FREQUENCIES = 128  # half of the sinusoidal embedding's 256 values
_MAX_PERIOD = 10_000.0
_TIME_SCALE = 1000.0  # from masked shares in [0, 1] to the range of the embedding's periods
_LAST_EPS = 1e-12
_CONV_REACH = 2
_NUM_STATES = 3  # of a row: masked, committed since the features were computed, committed before

NAMES = Names(
    [
        ("proj_in.", "narrow_features."),
        ("new_token_proj_in.", "narrow_control."),
        ("proj_out.", "widen."),
        ("last_layer.", "last."),
        ("time_embedder.mlp.", "time_mlp."),
        ("adaLN_modulation.", "modulation."),
        *(
            (f"blocks.#.{kind}_attn{published}", f"blocks.#.{kind}_{ours}")
            for kind in ("cross", "self")
            for published, ours in [
                (".norm.", "norm."),
                (".fn.mha.in_proj_", "attention.in_proj."),
                (".fn.mha.out_proj.", "attention.out_proj."),
                ("_ff.norm.", "mlp_norm."),
                ("_ff.fn.net.0.", "mlp.0."),
                ("_ff.fn.net.3.", "mlp.2."),
            ]
        ),
    ]
)


class Block(nn.Module):
    """Cross-attention to the control tokens, MLP, self-attention, MLP, each with a residual.

    Only queries are normed, not the control tokens, nor keys and values of the self-attention. Either attention can be
    left out together with its MLP.
    """

    def __init__(self, width: int, num_heads: int, uses_control: bool = True, uses_self_attention: bool = True) -> None:
        super().__init__()
        self.uses_control, self.uses_self_attention = uses_control, uses_self_attention
        if uses_control:
            self.cross_norm, self.cross_attention = nn.LayerNorm(width), Attention(width, num_heads)
            self.cross_mlp_norm, self.cross_mlp = nn.LayerNorm(width), feed_forward(width, 4 * width)
        if uses_self_attention:
            self.self_norm, self.self_attention = nn.LayerNorm(width), Attention(width, num_heads)
            self.self_mlp_norm, self.self_mlp = nn.LayerNorm(width), feed_forward(width, 4 * width)

    def forward(self, own: Tensor, x: Tensor, control: Tensor, is_real: Tensor | None, rows: Rows = ALL_ROWS) -> Tensor:
        """Map ``own``, ``rows`` of (B, S, c), given ``control`` (B, K, c), padding where ``is_real`` (B, K) is false.

        All rows are attended to; those that do not change are as in ``x`` (B, S, c).
        """
        if self.uses_control:
            own = own + self.cross_attention(self.cross_norm(own), control, is_real)
            own = own + self.cross_mlp(self.cross_mlp_norm(own))
        if self.uses_self_attention:
            own = own + self.self_attention(self.self_norm(own), rows.put(x, own))
            own = own + self.self_mlp(self.self_mlp_norm(own))
        return own


class ShortcutNetwork(nn.Module, ABC):
    """Parent of all shortcut networks: the features some steps later, f + S(f, control, r).

    S projects to the network's own width, then applies blocks, convolutions, a last layer, modulation by the masked
    share, and a projection back. With a bottleneck the last projection starts at zero, so that an untrained network
    repeats its input and training begins at "hold"; at ratio 1 there are no projections.

    Args:
        options: sizes and switches.
        blocks: blocks of width c, for :meth:`refine`.
        last: layer of width c after the blocks.
    """

    uses_places: ClassVar[bool] = False
    """True if the network needs the places of rows in the base's sequence."""

    hparams: dict[str, Any]

    def __init__(self, options: Options, blocks: nn.ModuleList, last: nn.Module) -> None:
        super().__init__()
        self.options = options
        width, inner, narrows = options.width, options.inner, options.bottleneck_ratio > 1
        self.narrow_features = nn.Linear(width, inner) if narrows else nn.Identity()
        self.narrow_control = nn.Linear(width, inner) if narrows and options.uses_control else nn.Identity()
        self.blocks, self.last = blocks, last
        if options.uses_time:
            self.time_mlp = _time_mlp(inner)
            self.modulation = nn.Linear(inner, 2 * inner)
        if options.anchored:
            self.gap_mlp = _time_mlp(inner)
        self.widen = nn.Linear(inner, width) if narrows else nn.Identity()
        for parameter in self.widen.parameters():
            nn.init.zeros_(parameter)
        grid, stride, reach = options.grid, options.stride, options.reach
        self.neighbourhood = Neighbourhood(inner, grid, reach, stride) if reach else None
        self.convs = nn.ModuleList(ConvBlock(inner, grid // stride, _CONV_REACH) for _ in range(options.num_convs))
        self.states = nn.Embedding(_NUM_STATES, inner) if options.uses_states else None
        if self.states is not None:
            nn.init.zeros_(self.states.weight)

    def forward(
        self,
        features: Tensor,
        control: Tensor,
        masked_share: Tensor,
        is_real: Tensor | None = None,
        places: Places | None = None,
        rows: Rows = ALL_ROWS,
        gap: Tensor | None = None,
    ) -> Tensor:
        """Predict features (B, S, C).

        Args:
            features: (B, S, C) of the present step, or of the last full step for an anchored network.
            control: (B, K, C), embeddings of the control tokens: those of a prefix, then those committed since.
            masked_share: (B,) r, share of image tokens still masked before the predicted step.
            is_real: (B, K), false where ``control`` is padding.
            places: places of ``features`` and ``control``, where the network uses them.
            rows: rows to predict; the others stay the same.
            gap: (B,) steps from ``features`` to the prediction, for an anchored network.

        Raises:
            ValueError: if an anchored network has no gap, or one with a reach or states no places.
        """
        x = self.narrow_features(features)
        if self.options.uses_control:
            control = self.narrow_control(control)
        if self.neighbourhood is not None or self.states is not None:
            if places is None or places.committed is None or places.committed_rows is None:
                raise ValueError("a network with a reach or states needs the places of the tokens committed")
            first = control.shape[1] - places.committed.shape[1]  # after those of a prefix
            new_is_real = None if is_real is None else is_real[:, first:]
            if self.states is not None:
                x = x + self.states(_row_states(x, places.committed_rows, new_is_real, rows))
            if self.neighbourhood is not None:
                beside = x.gather(1, places.committed_rows[..., None].expand(-1, -1, x.shape[-1]))
                near = self.neighbourhood(control[:, first:], beside, places.committed, new_is_real)
                x = x + F.pad(near, (0, 0, 0, x.shape[1] - near.shape[1]))
        own = self.refine(x, control, is_real, places, rows)
        for block in self.convs:
            own = block(own, x, rows)
        x = self.last(own)
        if self.options.uses_time:
            time = self.time_mlp(sinusoids(_TIME_SCALE * masked_share).to(x.dtype))
            if self.options.anchored:
                if gap is None:
                    raise ValueError("an anchored network needs the gap between its features and its prediction")
                time = time + self.gap_mlp(sinusoids(gap).to(x.dtype))
            scale, shift = self.modulation(time)[:, None].chunk(2, dim=-1)
            x = x * (1 + scale) + shift
        return rows.put(features, rows.take(features) + self.widen(x))

    def encode_places(self, places: Tensor) -> Tensor:
        """Encode ``places`` (B, S) in the base's sequence as :meth:`refine` uses them, (B, S, E); here as they are."""
        return places[..., None]

    @abstractmethod
    def refine(self, x: Tensor, control: Tensor, is_real: Tensor | None, places: Places | None, rows: Rows) -> Tensor:
        """Apply the blocks to ``rows`` of ``x`` (B, S, c), and return them.

        ``control`` (B, K, c) is padding where ``is_real`` (B, K) is false.
        """


class ShortcutNet(ShortcutNetwork):
    """The shortcut network of MaskGIT: layer norms, attention without positions.

    Args:
        width: C, width of the base's features.
        num_heads: attention heads.
        bottleneck_ratio: C over the network's own width c, at least 1; at 1 there are no projections.
        num_blocks: blocks in a row, at least 1.
        uses_time: condition on the masked share r.
        grid: side of the square token grid, for the neighbourhood, convolutions and states.
        reach: places that a committed token reaches in the neighbourhood; 0 leaves it out, as published.
        stride: side in tokens of the square that a row of the features stands for.
        uses_control: attend to the tokens just committed.
        uses_self_attention: attend to all rows.
        rows: ``all`` or only those still ``masked``.
        anchored: predict from the last full step.
        guided: predict the features after guidance, in one pass for both branches.
        num_convs: convolutions of the rows on the token grid, each with an MLP, after the blocks.
        uses_states: embed whether a row is still masked, was committed since the features were computed, or before.

    Raises:
        ValueError: if the ratio or the number of blocks is below 1, c is not a multiple of ``num_heads``, or options
            are incompatible.
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
        uses_control: bool = True,
        uses_self_attention: bool = True,
        rows: RowChoice = "all",
        anchored: bool = False,
        guided: bool = False,
        num_convs: int = 0,
        uses_states: bool = False,
    ) -> None:
        options = Options(
            width,
            bottleneck_ratio,
            num_blocks,
            uses_time=uses_time,
            uses_control=uses_control,
            uses_self_attention=uses_self_attention,
            rows=rows,
            anchored=anchored,
            grid=grid,
            reach=reach,
            stride=stride,
            guided=guided,
            num_convs=num_convs,
            uses_states=uses_states,
        )
        require_at_least(1, num_heads=num_heads)
        inner = options.inner
        last = nn.Sequential(
            nn.LayerNorm(inner, eps=_LAST_EPS),
            nn.Linear(inner, inner),
            nn.GELU(),
            nn.LayerNorm(inner, eps=_LAST_EPS),
        )
        blocks = nn.ModuleList(Block(inner, num_heads, uses_control, uses_self_attention) for _ in range(num_blocks))
        super().__init__(options, blocks, last)
        self.hparams = options.hparams() | {"num_heads": num_heads}
        del self.hparams["uses_prefix"]

    @classmethod
    def load(cls, path: Path) -> ShortcutNet:
        """Load the frozen network at ``path``; raises :class:`~lit_shortcut.weights.WeightsError` if it fails."""
        return load_module(cls, path)

    @classmethod
    def load_published(cls, path: Path, num_heads: int = 16) -> ShortcutNet:
        """Load the published state dict at ``path``, frozen.

        Width, bottleneck, blocks and time embedding are read from its tensors, which do not show the number of heads.

        Raises:
            WeightsError: if the file is missing, damaged, or not a MIGM-Shortcut.
        """
        state = load_state(path)
        try:
            sizes = published_sizes(state, inner=len(state["last_layer.1.weight"]))
            with torch.device("meta"):
                network = cls(num_heads=num_heads, **sizes)
        except (KeyError, IndexError) as error:
            raise WeightsError(
                f"{path}: expected a MIGM-Shortcut state dict with last_layer.1.weight and, if it has a bottleneck, "
                f"proj_in.weight (c, C); found {', '.join(sorted(state)[:8])}, …"
            ) from error
        except ValueError as error:
            raise WeightsError(f"{path}: {error}") from error
        fill(network, state, NAMES, path)
        return network

    def refine(self, x: Tensor, control: Tensor, is_real: Tensor | None, places: Places | None, rows: Rows) -> Tensor:
        """Apply the blocks to ``rows`` of ``x`` (B, S, c), and return them; ``places`` are not used."""
        own = rows.take(x)
        for block in self.blocks:
            own = block(own, x, control, is_real, rows)
        return own


def published_sizes(state: dict[str, Tensor], inner: int) -> dict[str, Any]:
    """Return a :class:`ShortcutNetwork`'s arguments, given its published ``state`` and own width ``inner`` (c)."""
    width = state["proj_in.weight"].shape[1] if "proj_in.weight" in state else inner
    ratio = width / inner
    return {
        "width": width,
        # the division may round below inner
        "bottleneck_ratio": ratio if int(width / ratio) == inner else math.nextafter(ratio, 1),
        "num_blocks": len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
        "uses_time": "time_embedder.mlp.0.weight" in state,
    }


def sinusoids(values: Tensor) -> Tensor:
    """Cosines, then sines, of ``values`` (B,) at geometric frequencies from 1 down to 1/10,000: (B, 256)."""
    exponents = torch.arange(_FREQUENCIES, dtype=torch.float32, device=values.device) / _FREQUENCIES
    angles = values.float()[:, None] * _MAX_PERIOD**-exponents
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def _row_states(x: Tensor, committed: Tensor, is_real: Tensor | None, rows: Rows) -> Tensor:
    """Return (B, S): 2 where ``rows`` of ``x`` are to be predicted, 1 at ``committed`` ones (B, K), else 0."""
    new = torch.ones_like(committed) if is_real is None else is_real.long()
    states = torch.zeros_like(x[..., 0], dtype=torch.long).scatter_add(1, committed, new).clamp(max=1)[..., None]
    return rows.put(states, torch.full_like(rows.take(states), 2))[..., 0]


def _time_mlp(inner: int) -> nn.Sequential:
    """Return an MLP from :func:`sinusoids` (B, 256) to (B, c)."""
    hidden = round(math.sqrt(2 * _FREQUENCIES * inner))
    return nn.Sequential(nn.Linear(2 * _FREQUENCIES, hidden), nn.SiLU(), nn.Linear(hidden, inner))
