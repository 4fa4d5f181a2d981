"""Training windows: which there are, in which order an epoch goes through them, and what is in one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from itertools import chain
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_shortcut.contracts import Conditions, Control, Text, Trajectories, Transition
from lit_shortcut.trajectory.encoding import Encoded, encode


class Window(NamedTuple):
    """Place of a training window: ``row`` in ``shard``, guidance ``branch``, ``start``, the step before it."""

    shard: int
    row: int
    branch: int
    start: int


@dataclass(frozen=True)
class Order:
    """The windows of full shards 0 … ``num_shards`` − 1, in an order that depends only on ``seed`` and epoch.

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

    @property
    def _per_shard(self) -> int:
        return self.rows * self.branches * self.starts


@lru_cache(maxsize=4)  # of the shards, and of the groups that a batch and its neighbours lie in
def _permutation(count: int, *key: int) -> Tensor:
    seed = int.from_bytes(blake2b(repr(key).encode(), digest_size=8).digest(), "big", signed=True)
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


class EncodedTransition(NamedTuple):
    """A :class:`Transition` as it leaves the loader: ``features``, of all R + 1 steps (B, R + 1, S, C), still encoded.

    ``replaced`` (B,) marks windows that stand in for damaged ones.
    """

    features: Encoded
    control: Control
    masked_share: Tensor
    is_masked: Tensor
    step: Tensor
    text: Text | None
    replaced: Tensor

    @classmethod
    def of(
        cls,
        features: Encoded,
        tokens: Tensor,
        committed_at: Tensor,
        step: Tensor,
        text: Text | None = None,
        replaced: Tensor | None = None,
    ) -> EncodedTransition:
        """The windows from ``step`` (B,) on, out of trajectories ``tokens``, ``committed_at`` (B, L)."""
        window = next(iter(features.parts.values())).shape[1] - 1
        steps = step[:, None, None] + torch.arange(window, device=step.device)[:, None]
        committed_at = committed_at[:, None]
        is_masked, is_now = committed_at > steps, committed_at == steps
        counts = is_now.sum(-1, keepdim=True)
        is_real = torch.arange(int(counts.max()), device=step.device) < counts
        positions = torch.zeros(is_real.shape, dtype=torch.long, device=step.device)
        positions[is_real] = is_now.nonzero()[:, -1]
        codes = tokens.long()[:, None].expand(-1, window, -1).gather(2, positions).where(is_real, 0)
        control = Control(codes, positions, None if bool(is_real.all()) else is_real)
        replaced = torch.zeros(len(step), dtype=torch.bool) if replaced is None else replaced
        return cls(features, control, is_masked.float().mean(-1), is_masked, step, text, replaced)

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
            text=self.text,
        )


def select(trajectories: Trajectories, places: Sequence[tuple[int, int, int]], window: int = 1) -> Transition:
    """The windows of ``window`` (R) steps at ``places``: row, branch and the step before the window."""
    row, branch, step = torch.tensor(places, device=trajectories.tokens.device).unbind(1)
    features, text = trajectories.features, None
    if trajectories.text is not None:  # rows that are padding to all are left out, others set to 0
        frame = features.shape[3] - trajectories.text.control.shape[-2]
        text = Text(*(part[row.to(part.device), branch.to(part.device)] for part in trajectories.text))
        text = text._replace(control=text.control[:, : int(text.num_control.max())])
        features = features[:, :, :, : frame + int(text.lengths.max())]
    steps = step[:, None] + torch.arange(window + 1, device=step.device)
    features = features[row[:, None], branch[:, None], steps]
    if text is not None:
        is_real = torch.arange(features.shape[2], device=step.device) < frame + text.lengths.to(step.device)[:, None]
        features = features.where(is_real[:, None, :, None], 0)
    encoded = encode(features, str(features.dtype).removeprefix("torch."))
    return EncodedTransition.of(encoded, trajectories.tokens[row], trajectories.committed_at[row], step, text).decode()


def concatenated(batches: Sequence[Trajectories]) -> Trajectories:
    """``batches`` as one, rows padded by zeros to the longest."""
    if len(batches) == 1:
        return batches[0]
    ids, seeds, labels = (torch.cat(column) for column in zip(*(one.conditions[:3] for one in batches), strict=True))
    prompts = tuple(chain.from_iterable(one.conditions.prompts for one in batches))
    features, tokens, committed_at = zip(*(one[1:4] for one in batches), strict=True)
    texts = [one.text for one in batches if one.text is not None]
    text = Text(*map(_joined, zip(*texts, strict=True))) if texts else None
    conditions = Conditions(ids, seeds, labels, prompts)
    return Trajectories(conditions, _joined(features), torch.cat(tokens), torch.cat(committed_at), text)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """``parts`` (B, …, S, C), or (B, G), one behind the other; S is padded by zeros to the longest."""
    longest = max(part.shape[-2] for part in parts)
    return torch.cat([F.pad(part, (0, 0, 0, longest - part.shape[-2])) if part.ndim > 2 else part for part in parts])
