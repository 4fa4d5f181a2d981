"""Random access to a shard: only the bytes needed, each member checked against its checksum.

Shards are read, not memory-mapped: a file truncated while it is open then raises an error instead of killing the
process.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from weakref import finalize

import torch
from torch import Tensor

from lit_shortcut.contracts import Conditions, Prefix, Trajectories
from lit_shortcut.trajectory.card import Card, TrajectoryError
from lit_shortcut.trajectory.encoding import Parts
from lit_shortcut.trajectory.index import Index, checksum, step_ending
from lit_shortcut.trajectory.writing import require_values


class Head(NamedTuple):
    """A sample without its features: ``tokens``, ``committed_at`` (L,), ``rows`` (S) of each branch.

    ``lengths`` (G,) and ``control`` (P, C) describe its text prefix; without one they are 0 and empty.
    """

    tokens: Tensor
    committed_at: Tensor
    rows: list[int]
    lengths: Tensor
    control: Tensor


class Shard:
    """Shard ``index`` of the set of ``card``, open at ``path`` with its index beside it; errors call it ``where``.

    The file is closed when the object is garbage-collected.

    Raises:
        TrajectoryError: if file or index is missing, or their sizes differ.
    """

    def __init__(self, path: Path, index: int, card: Card, where: str) -> None:
        self.where, self._card, self._ids = where, card, card.ids(index)
        self._heads: dict[int, Head] = {}
        self.index = Index.read(path, index, card)
        try:
            self._file = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise TrajectoryError(f"{where}: no readable shard ({error.strerror})") from error
        finalize(self, os.close, self._file)
        if (size := os.fstat(self._file).st_size) != self.index.bytes:
            raise TrajectoryError(f"{where}: expected {self.index.bytes} bytes as in its index, found {size}")

    def head(self, row: int) -> Head:
        """Return the sample at ``row`` in the shard without its features; it is read once."""
        if row not in self._heads:
            with self._named(row):
                self._heads[row] = self._head(row)
        return self._heads[row]

    def read_steps(self, row: int, branch: int, steps: Iterable[int], out: Parts) -> None:
        """Read ``steps`` of the sample at ``row`` into ``out``, parts (number of steps, ≥ S, …).

        Raises:
            TrajectoryError: naming the sample, if its bytes are damaged or do not fit the card.
        """
        num_rows = self.head(row).rows[branch]
        with self._named(row):
            for index, step in enumerate(steps):
                for part, room in out.items():
                    self._fill(row, step_ending(branch, step, part), room[index, :num_rows])

    def trajectory(self, row: int) -> Trajectories:
        """Return the whole sample at ``row``, decoded, as a batch of one; errors as in :meth:`read_steps`."""
        head, card = self.head(row), self._card
        parts = room_for(card, (card.branches, card.num_steps), max(head.rows))
        for branch in range(card.branches):
            self.read_steps(row, branch, range(card.num_steps), {part: room[branch] for part, room in parts.items()})
        with self._named(row):
            card.encoder.check(parts)
            facts = json.loads(self._load(row, "json").numpy().tobytes())
            kinds = {"id": int, "seed": int, "label": int} | ({"prompt": str} if card.prompts else {})
            if {name: type(value) for name, value in facts.items()} != kinds or facts["id"] != self._ids[row]:
                raise ValueError(f"json: expected {', '.join(kinds)} of this sample, found {facts}")
        ids, seeds, labels = (torch.tensor([facts[name]]) for name in ("id", "seed", "label"))
        prefix = None
        if card.text_rows:
            num_control = torch.tensor([len(head.control)] + [0] * (card.branches - 1))
            control = head.control.new_zeros(card.branches, int(head.lengths.max()), head.control.shape[1])
            control[0, : len(head.control)] = head.control
            prefix = Prefix(head.lengths[None], control[None], num_control[None])
        conditions = Conditions(ids, seeds, labels, (facts["prompt"],) if card.prompts else ())
        tokens, committed_at = head.tokens.long()[None], head.committed_at.long()[None]
        return Trajectories(conditions, card.encoder.decode(parts)[None], tokens, committed_at, prefix)

    def _head(self, row: int) -> Head:
        card = self._card
        length, width = card.spec["num_tokens"], card.spec["width"]
        grids = {"tokens": torch.empty(length).int(), "committed_at": torch.empty(length).short()}
        lengths, control = torch.zeros(card.branches).int(), torch.empty(0, width)
        for name, grid in grids.items():
            self._fill(row, f"{name}.npy", grid)
        if card.text_rows:
            self._fill(row, "prefix.lengths.npy", lengths)
            control = self._load(row, "prefix.control.npy").view(torch.float32).view(-1, width)
            if len(control) != lengths[0]:
                raise ValueError(f"prefix.control.npy: expected {int(lengths[0])} rows, found {len(control)}")
        part, (dtype, shape) = next(iter(card.encoder.members(1, width).items()))
        row_bytes = torch.empty(shape, dtype=dtype).nbytes
        rows = [self._size(row, step_ending(branch, 0, part)) // row_bytes for branch in range(card.branches)]
        require_values(grids, rows, lengths.tolist(), card)
        return Head(**grids, rows=rows, lengths=lengths.long(), control=control)

    @contextmanager
    def _named(self, row: int) -> Iterator[None]:
        try:
            yield
        except (ValueError, TypeError, KeyError, AttributeError, OSError, RecursionError) as error:
            problem = f"{error} is missing from the index" if isinstance(error, KeyError) else error
            raise TrajectoryError(f"{self.where}: sample {self._ids[row]:08d}: {problem}") from error

    def _size(self, row: int, ending: str) -> int:
        size = self.index.samples[f"{self._ids[row]:08d}"][ending][1]
        if not 0 <= size <= self.index.bytes:
            raise ValueError(f"{ending}: {size} bytes in a shard of {self.index.bytes}")
        return size

    def _load(self, row: int, ending: str) -> Tensor:
        tensor = torch.empty(self._size(row, ending), dtype=torch.uint8)
        self._fill(row, ending, tensor)
        return tensor

    def _fill(self, row: int, ending: str, tensor: Tensor) -> None:
        """Read a member into the contiguous ``tensor``."""
        offset, size, expected = self.index.samples[f"{self._ids[row]:08d}"][ending]
        view, done = tensor.view(-1).view(torch.uint8).numpy().data, 0
        if len(view) != size:
            raise ValueError(f"{ending}: expected {len(view)} bytes by the card, found {size}")
        while done < size:
            count = os.preadv(self._file, [view[done:]], offset + done)
            if not count:
                raise ValueError(f"{ending}: ends at byte {offset + done}; the shard is truncated")
            done += count
        if checksum(view) != expected:
            raise ValueError(f"{ending}: checksum differs; the file is damaged")


def room_for(card: Card, leading: tuple[int, ...], num_rows: int, empty: Callable[..., Tensor] = torch.empty) -> Parts:
    """Allocate encoded features (*leading, ``num_rows``, …) by ``empty``; zeros where rows may be padding."""
    kinds = card.encoder.members(num_rows, card.spec["width"])
    parts = {part: empty((*leading, *shape), dtype=dtype) for part, (dtype, shape) in kinds.items()}
    return {part: room.zero_() for part, room in parts.items()} if card.text_rows else parts
