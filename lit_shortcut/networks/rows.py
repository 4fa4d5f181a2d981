"""Choice of rows that a shortcut network predicts, and the options of all such networks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lit_shortcut.bounds import require_at_least

RowChoice = Literal["all", "masked"]


class Rows:
    """All rows of (B, S, c). Subclasses select rows to change; the others are only attended to."""

    def take(self, x: Tensor) -> Tensor:
        """Return the rows to compute, in an order of their own."""
        return x

    def put(self, x: Tensor, taken: Tensor) -> Tensor:
        """Return ``x`` (B, S, c) with the selected rows replaced by ``taken``, in the order of :meth:`take`."""
        return taken


ALL_ROWS = Rows()


class RowsAt(Rows):
    """The rows at ``index`` (B, M), all different, of ``num_rows`` (S); only M rows are computed.

    Rows are copied whole, by their places in the flattened batch: on a CPU gather and scatter, which look up every
    single value, take 5 to 30 times as long.
    """

    def __init__(self, index: Tensor, num_rows: int) -> None:
        self.shape = index.shape
        first = num_rows * torch.arange(len(index), device=index.device)[:, None]
        self.index = (first + index).flatten()

    def take(self, x: Tensor) -> Tensor:
        """Return the rows (B, M, c) at ``index``."""
        return x.flatten(0, 1).index_select(0, self.index).view(*self.shape, x.shape[-1])

    def put(self, x: Tensor, taken: Tensor) -> Tensor:
        """Return ``x`` (B, S, c) with ``taken`` (B, M, c) at ``index``."""
        return x.flatten(0, 1).index_copy(0, self.index, taken.flatten(0, 1)).view_as(x)


class RowsWhere(Rows):
    """Rows, among the first L, where ``mask`` (B, L) is true; all are computed, since their numbers may differ."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask

    def put(self, x: Tensor, taken: Tensor) -> Tensor:
        """Return ``x`` (B, S, c) with ``taken`` where ``mask`` is true."""
        mask = torch.nn.functional.pad(self.mask, (0, x.shape[1] - self.mask.shape[1]))
        return torch.where(mask[..., None], taken, x)


@dataclass(frozen=True)
class Options:
    """Sizes and switches of every shortcut network.

    Args:
        width: C, width of the base's features.
        bottleneck_ratio: C over the network's own width c, at least 1; at 1 there are no projections.
        num_blocks: blocks in a row, at least 1.
        uses_time: condition on the masked share r.
        uses_control: attend to the tokens committed since the features were computed.
        uses_prefix: the tokens of a text prefix are control tokens, too.
        uses_self_attention: attend to all rows of the features.
        rows: predict ``all`` rows of the features, as published, or only those still ``masked``; all are attended to.
        anchored: predict from the last full step, all tokens committed since, and the number of steps since, instead of
            step by step.
        grid: side of the square token grid, for the neighbourhood, convolutions and states.
        reach: reach of the :class:`~lit_shortcut.networks.neighbourhood.Neighbourhood` added before the blocks; 0
            leaves it out, as published.
        stride: side in tokens of the square that a row of the features stands for.
        guided: predict the features after guidance, in one pass, instead of those of each guidance branch; for bases
            with a linear head (:func:`~lit_shortcut.guidance.guide_rows`).
        num_convs: :class:`~lit_shortcut.networks.neighbourhood.ConvBlock` s after the blocks; 0, as published, leaves
            them out.
        uses_states: embed whether a row is still masked, was committed since the features were computed, or before.

    Raises:
        ValueError: if a size is below 1 or switches are incompatible.
    """

    width: int
    bottleneck_ratio: float
    num_blocks: int
    uses_time: bool = True
    uses_control: bool = True
    uses_prefix: bool = True
    uses_self_attention: bool = True
    rows: RowChoice = "all"
    anchored: bool = False
    grid: int = 0
    reach: int = 0
    stride: int = 1
    guided: bool = False
    num_convs: int = 0
    uses_states: bool = False

    def __post_init__(self) -> None:
        require_at_least(1, width=self.width, bottleneck_ratio=self.bottleneck_ratio, num_blocks=self.num_blocks)
        require_at_least(1, stride=self.stride)
        require_at_least(0, grid=self.grid, reach=self.reach, num_convs=self.num_convs)
        if self.reach and not self.uses_control:
            raise ValueError("reach needs uses_control: true, since it places control tokens on the grid; got false")
        if (self.num_convs or self.uses_states) and not self.grid:
            raise ValueError("num_convs and uses_states need the side of the token grid; got grid 0")
        if self.uses_states and self.rows != "masked":
            raise ValueError(f"uses_states needs rows: masked, which says what is masked; got {self.rows!r}")
        if self.rows not in ("all", "masked"):
            raise ValueError(f"rows must be all or masked, got {self.rows!r}")
        if self.anchored and not self.uses_time:
            raise ValueError("anchored networks learn the gap through the time embedding; set uses_time to true")

    @property
    def inner(self) -> int:
        """The network's own width c."""
        return int(self.width / self.bottleneck_ratio)

    def hparams(self) -> dict[str, Any]:
        """The options as constructor arguments."""
        return dict(vars(self))
