"""Training windows of a recorded set: their order in an epoch, and batches of them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from hashlib import blake2b
from threading import Lock
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from datamodules.memory import Memory
from lit_shortcut.bounds import require_at_least
from lit_shortcut.contracts import Prefix
from lit_shortcut.trajectory import Source, TrajectoryError
from lit_shortcut.trajectory.encoding import Parts
from lit_shortcut.trajectory.reading import Head, Shard, room_for
from lit_shortcut.trajectory.transitions import EncodedTransition

OnCorrupt = Literal["raise", "skip"]
_log = logging.getLogger(__name__)


class Window(NamedTuple):
    """Place of a training window: ``row`` in ``shard``, guidance ``branch``, and ``start``, the step before it.

    ``gap`` is the number of steps from there to its first target.
    """

    shard: int
    row: int
    branch: int
    start: int
    gap: int


def spans(starts: int, max_gap: int) -> list[tuple[int, int]]:
    """Return start and gap of each window in a trajectory's branch; see :class:`Order`."""
    return [(start, gap) for gap in range(1, 1 + max_gap) for start in range(starts + 1 - gap)]


def require_spans(num_steps: int | None = None, *, window: int, max_gap: int) -> None:
    """Refuse a ``window`` or ``max_gap`` that is below 1, not below ``num_steps``, or both above 1; the first by name.

    Raises:
        ValueError: naming the argument.
    """
    require_at_least(1, window=window, max_gap=max_gap)
    if window > 1 and max_gap > 1:
        raise ValueError(f"max_gap must be 1 where window is above 1; got window {window} and max_gap {max_gap}")
    for name, steps in {"window": window, "max_gap": max_gap}.items():
        if num_steps is not None and steps >= num_steps:
            raise ValueError(f"{name} must be below {num_steps}, the number of steps; got {steps}")


@dataclass(frozen=True)
class Order:
    """Windows of full shards 0 … ``num_shards`` − 1, in an order that depends only on ``seed`` and epoch.

    Shards are shuffled and taken ``group`` at a time; the windows of a group are shuffled among themselves. So
    consecutive batches mix the trajectories of a group, and only its shards are needed at a time. The order is computed
    for any position without reading data or going through earlier positions.

    Args:
        num_shards: number of shards, all full.
        rows: trajectories in a shard.
        branches: G.
        starts: steps of a trajectory that windows begin at, N − R.
        max_gap: largest gap; above 1, R is 1, and a window is any two steps at most this far apart.
        group: shards that are shuffled together.
        seed: seed of the order.
    """

    num_shards: int
    rows: int
    branches: int
    starts: int
    group: int
    seed: int
    max_gap: int = 1

    @cached_property
    def spans(self) -> list[tuple[int, int]]:
        """Start and gap of each window in a trajectory's branch."""
        return spans(self.starts, self.max_gap)

    def __len__(self) -> int:
        return self.num_shards * self._per_shard

    def shards(self, epoch: int, group: int) -> list[int]:
        """Shards of group number ``group`` of ``epoch``; none after the last group."""
        return _permutation(self.num_shards, self.seed, epoch)[group * self.group : (group + 1) * self.group].tolist()

    def group_at(self, position: int) -> int:
        """Group of the window at ``position`` of an epoch."""
        return position // (self.group * self._per_shard)

    def at(self, epoch: int, position: int) -> Window:
        """Window at ``position`` in ``epoch``."""
        group = self.group_at(position)
        shards = self.shards(epoch, group)
        shuffled = _permutation(len(shards) * self._per_shard, self.seed, epoch, group)
        number, span = divmod(int(shuffled[position - group * self.group * self._per_shard]), len(self.spans))
        number, branch = divmod(number, self.branches)
        shard, row = divmod(number, self.rows)
        return Window(shards[shard], row, branch, *self.spans[span])

    def first_targets(self, epoch: int, positions: range) -> list[int]:
        """Step of the first target of the windows at ``positions`` in ``epoch``."""
        found: list[int] = []
        size = self.group * self._per_shard
        for group in range(self.group_at(positions[0]), self.group_at(positions[-1]) + 1):
            count = len(self.shards(epoch, group)) * self._per_shard
            own = slice(max(0, positions.start - group * size), positions.stop - group * size)
            shuffled = _permutation(count, self.seed, epoch, group)
            found += [sum(self.spans[span]) for span in (shuffled[own] % len(self.spans)).tolist()]
        return found

    @property
    def _per_shard(self) -> int:
        return self.rows * self.branches * len(self.spans)


@lru_cache(maxsize=4)  # one of the shards, and those of the groups around a batch
def _permutation(count: int, *key: int) -> Tensor:
    seed = int.from_bytes(blake2b(repr(key).encode(), digest_size=8).digest(), "big", signed=True)
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


class WindowReader:
    """Reader of windows of ``window`` (R) steps in ``order``; keeps the memory of as many batches as are in use.

    Args:
        source: the shards.
        order: order of the windows.
        window: R.
        on_corrupt: treatment of damaged windows: ``raise`` an error, or replace them by the next readable ones of the
            order (``skip``), which the batch marks; each damaged sample is logged once.
        guidance: scales of the N steps, to read all branches and guide their features; ``order`` then has one branch.
    """

    def __init__(
        self,
        source: Source,
        order: Order,
        window: int,
        on_corrupt: OnCorrupt = "raise",
        guidance: Sequence[float] | None = None,
    ) -> None:
        self.source, self.order, self.window, self.on_corrupt = source, order, window, on_corrupt
        self.guidance = guidance
        self._known: set[tuple[int, int]] = set()
        self._ahead: list[int] = []
        self._lock, self._memory = Lock(), Memory()

    def read(self, epoch: int, positions: range) -> EncodedTransition:
        """Read the windows at ``positions`` of ``epoch`` as one batch.

        Raises:
            TrajectoryError: if one is damaged; with ``skip``, if all are.
            AccessError: if one cannot be fetched.
        """
        if self.source.is_remote:
            self._fetch_ahead(epoch, positions[0])
        card = self.source.card
        leading = (len(positions), 1 if self.guidance is None else card.branches, self.window + 1)
        parts = room_for(card, leading, card.spec["sequence_length"], self._memory.empty)
        heads, windows, replaced = [], [], []
        for slot, position in enumerate(positions):
            room = {part: values[slot] for part, values in parts.items()}
            window, head = self._read_one(room, epoch, position)
            heads.append(head)
            windows.append(window)
            replaced.append(window != self.order.at(epoch, position))
        prefix = None
        if card.text_rows:
            num_rows = max(head.rows[window.branch] for head, window in zip(heads, windows, strict=True))
            parts = {part: values[:, :, :, :num_rows].contiguous() for part, values in parts.items()}
            prefix = _prefix_of(heads, windows)
        tokens, committed_at = (torch.stack(grids) for grids in zip(*(head[:2] for head in heads), strict=True))
        step, gap = (torch.tensor(column) for column in zip(*(window[3:] for window in windows), strict=True))
        batch = EncodedTransition.of(card.encoding, parts, tokens, committed_at, step, gap, prefix, self.guidance)
        return batch._replace(replaced=tuple(replaced))

    def _read_one(self, room: Parts, epoch: int, position: int) -> tuple[Window, Head]:
        """Read the window at ``position``, or the next readable one, into ``room``."""
        for number in range(len(self.order)):
            window = self.order.at(epoch, (position + number) % len(self.order))

            def read(shard: Shard, window: Window = window) -> Head:
                first = window.start + window.gap
                steps = [window.start, *range(first, first + self.window)]
                branches = [window.branch] if self.guidance is None else range(self.source.card.branches)
                for place, branch in enumerate(branches):
                    own = {part: values[place] for part, values in room.items()}
                    shard.read_steps(window.row, branch, steps, own)
                return shard.head(window.row)

            try:
                return window, self.source.read(window.shard, read)
            except TrajectoryError as error:
                if self.on_corrupt == "raise":
                    raise
                if window[:2] not in self._known:
                    self._known.add(window[:2])
                    _log.warning("skipped: %s", error)
            for values in room.values():
                values.zero_()
        raise TrajectoryError(f"{self.source.source}: no window is readable")

    def _fetch_ahead(self, epoch: int, position: int) -> None:
        """Fetch the shards of the group after that of ``position`` in the background; before the first, its own."""
        group = self.order.group_at(position)
        shards = self.order.shards(epoch, group + 1) or self.order.shards(epoch + 1, 0)
        with self._lock:
            if shards != self._ahead:
                own = [] if self._ahead else self.order.shards(epoch, group)
                self._ahead = shards
                self.source.fetch_ahead([*own, *shards])


def _prefix_of(heads: list[Head], windows: list[Window]) -> Prefix:
    """Return the text prefixes of the windows' branches; only the first branch has control."""
    branches = [window.branch for window in windows]
    lengths = torch.stack([head.lengths[branch] for head, branch in zip(heads, branches, strict=True)])
    controls = [head.control[: None if branch == 0 else 0] for head, branch in zip(heads, branches, strict=True)]
    num_control = torch.tensor([len(control) for control in controls])
    return Prefix(lengths, torch.nn.utils.rnn.pad_sequence(controls, batch_first=True), num_control)
