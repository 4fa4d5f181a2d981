"""Training windows: which there are, in which order an epoch goes through them, and what is in one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import NamedTuple

import torch
from torch import Tensor

from lit_shortcut.contracts import Control, Prefix, Trajectories, Transition
from lit_shortcut.trajectory.encoding import Encoded


class Window(NamedTuple):
    """Place of a training window: ``row`` in ``shard``, guidance ``branch``, ``start``, the step before it."""

    shard: int
    row: int
    branch: int
    start: int


@dataclass(frozen=True)
class Order:
    """The windows of full shards 0 … ``num_shards`` − 1, in an order that ``seed`` and epoch alone decide.

    Shards are shuffled and taken ``group`` at a time; the windows of a group are shuffled among themselves. So
    consecutive batches mix the trajectories of a group, and no more shards are needed at a time. The order is
    arithmetic: any part of it is known without reading or going through what comes before.

    Args:
        num_shards: shards to draw from, all full.
        rows: trajectories in a shard.
        branches: G.
        starts: windows in a trajectory's branch, N − R.
        group: shards that are shuffled together.
        seed: of the order.
    """

    num_shards: int
    rows: int
    branches: int
    starts: int
    group: int
    seed: int

    def __len__(self) -> int:
        return self.num_shards * self._per_shard

    def shards(self, epoch: int, group: int) -> list[int]:
        """Shards of the ``group``-th group of ``epoch``; none behind the last."""
        return _permutation(self.num_shards, self.seed, epoch)[group * self.group : (group + 1) * self.group].tolist()

    def group_at(self, position: int) -> int:
        """The group that the window at ``position`` of an epoch is in."""
        return position // (self.group * self._per_shard)

    def at(self, epoch: int, position: int) -> Window:
        """The window at ``position`` in ``epoch``."""
        group = self.group_at(position)
        shards = self.shards(epoch, group)
        shuffled = _permutation(len(shards) * self._per_shard, self.seed, epoch, group)
        number, start = divmod(int(shuffled[position - group * self.group * self._per_shard]), self.starts)
        number, branch = divmod(number, self.branches)
        shard, row = divmod(number, self.rows)
        return Window(shards[shard], row, branch, start)

    def steps_before(self, epoch: int, positions: range) -> list[int]:
        """``start`` of the windows at ``positions`` in ``epoch``."""
        found: list[int] = []
        size = self.group * self._per_shard
        for group in range(self.group_at(positions[0]), self.group_at(positions[-1]) + 1):
            count = len(self.shards(epoch, group)) * self._per_shard
            own = slice(max(0, positions.start - group * size), positions.stop - group * size)
            shuffled = _permutation(count, self.seed, epoch, group)
            found += (shuffled[own] % self.starts).tolist()
        return found

    @property
    def _per_shard(self) -> int:
        return self.rows * self.branches * self.starts


@lru_cache(maxsize=4)  # of the shards, and of the groups that a batch and its neighbours lie in
def _permutation(count: int, *key: int) -> Tensor:
    seed = int.from_bytes(blake2b(repr(key).encode(), digest_size=8).digest(), "big", signed=True)
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


class EncodedTransition(NamedTuple):
    """A :class:`Transition` as it leaves the loader: ``features``, of all R + 1 steps (B, R + 1, S, C), still encoded.

    ``replaced`` (B,) tells which windows stand in for damaged ones.
    """

    features: Encoded
    control: Control
    masked_share: Tensor
    is_masked: Tensor
    step: Tensor
    text: Prefix | None
    replaced: Tensor

    def decode(self) -> Transition:
        """The batch with its features as numbers, on the device it lies on."""
        features = self.features.decode()
        return Transition(
            features=features[:, 0],
            control=self.control,
            masked_share=self.masked_share,
            targets=features[:, 1:],
            is_masked=self.is_masked,
            step=self.step,
            prefix=self.text,
        )


class Course(NamedTuple):
    """What happens to the tokens in a window; see :class:`Transition`."""

    control: Control
    masked_share: Tensor
    is_masked: Tensor


def course(tokens: Tensor, committed_at: Tensor, start: Tensor, window: int) -> Course:
    """The ``window`` (R) steps after ``start`` (B,) of trajectories ``tokens``, ``committed_at`` (B, L)."""
    steps = start[:, None, None] + torch.arange(window, device=start.device)[:, None]
    committed_at = committed_at[:, None]
    is_masked, is_now = committed_at > steps, committed_at == steps
    counts = is_now.sum(-1, keepdim=True)
    is_real = torch.arange(int(counts.max()), device=start.device) < counts
    positions = torch.zeros(is_real.shape, dtype=torch.long, device=start.device)
    positions[is_real] = is_now.nonzero()[:, -1]
    codes = tokens.long()[:, None].expand(-1, window, -1).gather(2, positions).where(is_real, 0)
    padding = None if bool(is_real.all()) else is_real
    return Course(Control(codes, positions, padding), is_masked.float().mean(-1), is_masked)


def transitions(trajectories: Trajectories, window: int = 1) -> Transition:
    """All windows of ``window`` (R) steps in ``trajectories``: B · G · (N − R), start by start within each branch."""
    count, branches, num_steps = trajectories.features.shape[:3]
    places = [(b, g, s) for b in range(count) for g in range(branches) for s in range(num_steps - window)]
    return select(trajectories, places, window)


def select(trajectories: Trajectories, places: Sequence[tuple[int, int, int]], window: int = 1) -> Transition:
    """The windows of ``window`` (R) steps at ``places``: row, branch and the step before the window."""
    row, branch, start = torch.tensor(places, device=trajectories.tokens.device).unbind(1)
    steps = start[:, None] + torch.arange(window + 1, device=start.device)
    features = trajectories.features[row[:, None], branch[:, None], steps]
    control, masked_share, is_masked = course(trajectories.tokens[row], trajectories.committed_at[row], start, window)
    text = None
    if trajectories.prefix is not None:
        text = Prefix(*(part[row.to(part.device), branch.to(part.device)] for part in trajectories.prefix))
        padding = trajectories.prefix.control.shape[-2] - int(text.lengths.max())
        features, text = trimmed(features, text, features.shape[2] - padding)
    return Transition(features[:, 0], control, masked_share, features[:, 1:], is_masked, start, text)


def trimmed(features: Tensor, text: Prefix, num_rows: int) -> tuple[Tensor, Prefix]:
    """``features`` (B, R + 1, S, C) and ``text`` without the rows that are padding to all of them.

    ``num_rows`` are those of the longest text. What pads shorter ones is set to 0.
    """
    longest = int(text.lengths.max())
    own = num_rows - longest + text.lengths.to(features.device)
    is_real = torch.arange(num_rows, device=features.device) < own[:, None]
    features = features[:, :, :num_rows].where(is_real[:, None, :, None], 0)
    return features, text._replace(control=text.control[:, : int(text.num_control.max())])
