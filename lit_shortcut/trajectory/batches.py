"""Batches of training windows, read from shards at any place."""

from __future__ import annotations

import logging
from typing import Literal

import torch

from lit_shortcut.contracts import Text
from lit_shortcut.trajectory.encoding import Encoded, Parts
from lit_shortcut.trajectory.files import AccessError, TrajectoryError
from lit_shortcut.trajectory.reading import Head, Shard, room_for
from lit_shortcut.trajectory.source import Source
from lit_shortcut.trajectory.windows import EncodedTransition, Order, Window

OnCorrupt = Literal["raise", "skip"]
_log = logging.getLogger(__name__)


class WindowReader:
    """Reads windows of ``window`` (R) steps in ``order``.

    Of memory it holds the batch it makes, (B, R + 1, S, C) as stored, and what is small.

    Args:
        source: of the shards.
        order: of the windows.
        window: R.
        on_corrupt: what a damaged window does: ``raise`` an error, or give its place in the batch to the next readable
            one of the order (``skip``), which the batch then marks; each damaged sample is logged once.
    """

    def __init__(self, source: Source, order: Order, window: int, on_corrupt: OnCorrupt = "raise") -> None:
        self.source, self.order, self.window, self.on_corrupt = source, order, window, on_corrupt
        self._known: set[tuple[int, int]] = set()
        self._ahead: list[int] = []

    def read(self, epoch: int, positions: range) -> EncodedTransition:
        """The windows at ``positions`` of ``epoch``, as one batch.

        Raises:
            TrajectoryError: if one is damaged, or with ``skip`` all are.
            AccessError: if one cannot be fetched.
        """
        if self.source.is_remote:
            self._fetch_ahead(epoch, positions[0])
        card = self.source.card
        parts = room_for(card, (len(positions), self.window + 1), card.spec["sequence_length"])
        heads, windows, replaced = [], [], []
        for slot, position in enumerate(positions):
            room = {part: values[slot] for part, values in parts.items()}
            window, head = self._read_one(room, epoch, position)
            heads.append(head)
            windows.append(window)
            replaced.append(window != self.order.at(epoch, position))
        text = None
        if card.text_rows:
            num_rows = max(head.rows[window.branch] for head, window in zip(heads, windows, strict=True))
            parts = {part: values[:, :, :num_rows].contiguous() for part, values in parts.items()}
            text = _text(heads, windows)
        tokens, committed_at = (torch.stack(grids) for grids in zip(*(head[:2] for head in heads), strict=True))
        step = torch.tensor([window.start for window in windows])
        features = Encoded(card.encoding, parts)
        return EncodedTransition.of(features, tokens, committed_at, step, text, torch.tensor(replaced))

    def _read_one(self, room: Parts, epoch: int, position: int) -> tuple[Window, Head]:
        """Read the window at ``position``, or the next readable one, into ``room``."""
        for number in range(len(self.order)):
            window = self.order.at(epoch, (position + number) % len(self.order))

            def read(shard: Shard, window: Window = window) -> Head:
                shard.read_steps(window.row, window.branch, window.start, room)
                return shard.head(window.row)

            try:
                return window, self.source.read(window.shard, read)
            except TrajectoryError as error:
                if self.on_corrupt == "raise" or isinstance(error, AccessError):
                    raise
                if window[:2] not in self._known:
                    self._known.add(window[:2])
                    _log.warning("skipped: %s", error)
            for values in room.values():
                values.zero_()
        raise TrajectoryError(f"{self.source.source}: no window is readable")

    def _fetch_ahead(self, epoch: int, position: int) -> None:
        """Fetch the shards of the group behind that of ``position`` beside what is read."""
        group = self.order.group_at(position)
        shards = self.order.shards(epoch, group + 1) or self.order.shards(epoch + 1, 0)
        if shards != self._ahead:
            self._ahead = shards
            self.source.fetch_ahead(shards)


def _text(heads: list[Head], windows: list[Window]) -> Text:
    """The texts of the windows' branches; only the first has control."""
    branches = [window.branch for window in windows]
    lengths = torch.stack([head.lengths[branch] for head, branch in zip(heads, branches, strict=True)])
    controls = [head.control[: None if branch == 0 else 0] for head, branch in zip(heads, branches, strict=True)]
    num_control = torch.tensor([len(control) for control in controls])
    return Text(lengths, torch.nn.utils.rnn.pad_sequence(controls, batch_first=True), num_control)
