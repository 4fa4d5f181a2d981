"""Batches of training windows, read from shards at any place."""

from __future__ import annotations

import logging
from contextlib import suppress
from threading import Thread
from typing import Literal

import torch

from lit_shortcut.contracts import Prefix
from lit_shortcut.trajectory.encoding import Encoded
from lit_shortcut.trajectory.files import AccessError, TrajectoryError
from lit_shortcut.trajectory.reading import Head, empty_steps
from lit_shortcut.trajectory.sample import branch_texts, joined, padded
from lit_shortcut.trajectory.source import Source
from lit_shortcut.trajectory.windows import EncodedTransition, Order, Window, course, trimmed

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
            one of the order (``skip``), which the batch then tells; each damaged sample is logged once.
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
        batch = _Batch(self.source, self.window, len(positions))
        replaced = torch.zeros(len(positions), dtype=torch.bool)
        for slot, position in enumerate(positions):
            replaced[slot] = self._read_one(batch, slot, epoch, position)
        return batch.finished(replaced)

    def _read_one(self, batch: _Batch, slot: int, epoch: int, position: int) -> bool:
        """Read the window at ``position``, or the next readable one, and tell whether it was another."""
        for number in range(len(self.order)):
            window = self.order.at(epoch, (position + number) % len(self.order))
            try:
                batch.read(slot, window)
            except TrajectoryError as error:
                if self.on_corrupt == "raise" or isinstance(error, AccessError):
                    raise
                self._note(window, error)
            else:
                return number > 0
        raise TrajectoryError(f"{self.source.source}: no window is readable")

    def _fetch_ahead(self, epoch: int, position: int) -> None:
        """Have the shards of the group behind that of ``position`` fetched beside what is read."""
        group = self.order.group_at(position)
        shards = self.order.shards(epoch, group + 1) or self.order.shards(epoch + 1, 0)
        if shards != self._ahead:
            self._ahead = shards
            Thread(target=self._fetch, args=(shards,), daemon=True).start()

    def _fetch(self, shards: list[int]) -> None:
        for shard in shards:
            with suppress(TrajectoryError):  # whoever reads the shard meets the error and tells it
                self.source.fetch(shard)

    def _note(self, window: Window, error: TrajectoryError) -> None:
        if window[:2] not in self._known:
            self._known.add(window[:2])
            _log.warning("skipped: %s", error)


class _Batch:
    """A batch while it is read. Samples equally long are read into place, others padded at the end."""

    def __init__(self, source: Source, window: int, size: int) -> None:
        self._source, self._window, self._size = source, window, size
        self._heads: list[Head] = []
        self._windows: list[Window] = []
        self._features: list[Encoded] = []
        self._all: Encoded | None = None

    def read(self, slot: int, window: Window) -> None:
        """Read ``window`` as the batch's row ``slot``, the one behind those read."""
        shard = self._source.shard(window.shard)
        head = shard.head(window.row)
        features = self._room(slot, head)
        shard.read_steps(window.row, window.branch * self._source.card.num_steps + window.start, features)
        self._heads.append(head)
        self._windows.append(window)
        self._features.append(features)

    def finished(self, replaced: torch.Tensor) -> EncodedTransition:
        """The batch of all rows read."""
        tokens, committed_at = (
            torch.stack([head.tensors[name] for head in self._heads]) for name in ("tokens", "committed_at")
        )
        start = torch.tensor([window.start for window in self._windows])
        control, masked_share, is_masked = course(tokens, committed_at, start, self._window)
        features, text = self._all, None
        if features is None:
            features, text = self._padded()
        return EncodedTransition(features, control, masked_share, is_masked, start, text, replaced)

    def _room(self, slot: int, head: Head) -> Encoded:
        card, steps = self._source.card, self._window + 1
        if card.prompts:
            return empty_steps((steps, head.num_rows, card.spec["width"]), card.dtype)
        if self._all is None:
            self._all = empty_steps((self._size, steps, head.num_rows, card.spec["width"]), card.dtype)
        return self._all.map(lambda part: part[slot])

    def _padded(self) -> tuple[Encoded, Prefix]:
        texts = []
        for head, window in zip(self._heads, self._windows, strict=True):
            of_all = branch_texts(head.tensors["text_lengths"], head.tensors["text_control"])
            texts.append(Prefix(*(part[window.branch : window.branch + 1] for part in of_all)))
        text = joined(texts, torch.cat)
        assert text is not None
        num_rows = max(head.num_rows for head in self._heads)
        frame = num_rows - max(int(head.tensors["text_lengths"].max()) for head in self._heads)
        num_rows = frame + int(text.lengths.max())
        values = torch.stack(padded([one.values for one in self._features]))
        scales = [one.scales[..., None] for one in self._features if one.scales is not None]
        values, cut = trimmed(values, text, num_rows)
        if not scales:
            return Encoded(values), cut
        return Encoded(values, trimmed(torch.stack(padded(scales)), text, num_rows)[0][..., 0]), cut
