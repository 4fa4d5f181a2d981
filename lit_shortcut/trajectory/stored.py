"""A sample as it is stored, encoded a few steps at a time: however long it is, its bytes never lie in memory whole."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from lit_shortcut.contracts import Trajectories
from lit_shortcut.trajectory.card import Card
from lit_shortcut.trajectory.encoding import DTYPES, SCALES, Dtype, encode
from lit_shortcut.trajectory.sample import (
    bytes_of,
    header_of,
    lay_out,
    require_finite_features,
    require_members,
    require_values,
)
from lit_shortcut.trajectory.sidecar import checksum

_Chunk = bytes | memoryview
_AT_ONCE = 2**22  # bytes of features that are encoded together, one step at least


class StoredSample:
    """The safetensors member of the sample at ``row`` of ``trajectories``, without what pads it to its batch.

    ``size`` are its bytes. ``rest`` and ``steps`` are the checksums that a sidecar keeps; those of the steps are
    complete once :meth:`open` has been read to the end.

    Raises:
        TrajectoryError: beginning with ``where``, if it does not fit ``card``.
    """

    def __init__(self, trajectories: Trajectories, row: int, card: Card, where: str) -> None:
        self._features, small = _parts(trajectories, row)
        self._where, self._dtype = where, cast(Dtype, card.dtype)  # a card has one of these alone
        shape = tuple(self._features.shape)
        kinds = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in small.items()}
        kinds["features"] = (DTYPES[card.dtype], shape)
        if card.dtype == "int8":
            kinds["scales"] = (SCALES, shape[:-1])
        members = lay_out(kinds)
        require_members(members, card, where)
        require_values(small, shape[-2], card, where)
        self.size = max(member.stop for member in members.values())
        order = list(members)
        place = order.index("features")
        self._before: list[_Chunk] = [header_of(members)]
        self._before += [bytes_of(small[name]) for name in order[:place]]
        self._behind: list[_Chunk] = [bytes_of(small[name]) for name in order[place + 1 :] if name != "scales"]
        self.rest = checksum(*self._before, *self._behind)
        self.steps: list[str] = []

    def open(self) -> BinaryIO:
        """The bytes, to be read once.

        Raises:
            TrajectoryError: while it is read, if the features are not finite as stored.
        """
        return io.BufferedReader(_Chunks(self._chunks()))

    def _chunks(self) -> Iterator[_Chunk]:
        yield from self._before
        steps = self._features.flatten(0, 1)
        # of all steps in one place: small pieces that outlive a block would be cut from the room of the next, which
        # then takes new memory
        scales = torch.empty(len(steps), steps.shape[1] if self._dtype == "int8" else 0, dtype=SCALES)
        first = 0
        at_once = max(1, _AT_ONCE // max(1, steps[0].numel() * steps.dtype.itemsize))
        for block in steps.split(at_once):
            encoded = encode(block, self._dtype).map(torch.Tensor.cpu).map(torch.Tensor.contiguous)
            require_finite_features(encoded, self._where)
            if encoded.scales is not None:
                scales[first : first + len(block)] = encoded.scales
            for step, own in zip(encoded.values, scales[first : first + len(block)].split(1), strict=True):
                values = bytes_of(step)
                self.steps.append(checksum(values, bytes_of(own)))
                yield values
            first += len(block)
        yield bytes_of(scales)
        yield from self._behind


class _Chunks(io.RawIOBase):
    """Reads ``chunks``, one behind the other."""

    def __init__(self, chunks: Iterator[_Chunk]) -> None:
        super().__init__()
        self._chunks, self._left = chunks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        while not self._left:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._left = memoryview(chunk)
        target = memoryview(buffer)
        count = min(len(target), len(self._left))
        target[:count], self._left = self._left[:count], self._left[count:]
        return count


def _parts(trajectories: Trajectories, row: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Features (G, N, S, C) of one sample, S without padding, and the tensors beside them as stored."""
    features = trajectories.features[row]
    small = {
        "tokens": trajectories.tokens[row].to("cpu", torch.int32),
        "committed_at": trajectories.committed_at[row].to("cpu", torch.int16),
    }
    if trajectories.prefix is not None:
        text = trajectories.prefix
        lengths = text.lengths[row].to("cpu", torch.int32)
        features = features[:, :, : features.shape[2] - (text.control.shape[-2] - int(lengths.max()))]
        small["text_lengths"] = lengths
        small["text_control"] = text.control[row, 0, : int(text.num_control[row, 0])].cpu()
    return features, {name: tensor.contiguous() for name, tensor in small.items()}
