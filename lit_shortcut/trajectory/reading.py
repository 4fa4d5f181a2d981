"""Read a shard at any place: headers once, then the bytes asked for, each checked against its checksum.

Read, not memory-mapped: a file that is cut while it is open then gives an error instead of ending the process.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any, NamedTuple
from weakref import finalize

import torch
from torch import Tensor

from lit_shortcut.trajectory.card import Card
from lit_shortcut.trajectory.encoding import DTYPES, SCALES, Encoded
from lit_shortcut.trajectory.files import TrajectoryError
from lit_shortcut.trajectory.sample import (
    Range,
    Trajectory,
    bytes_of,
    header_limit,
    parse_header,
    require_finite_features,
    require_members,
    require_values,
    rest_of,
    step_blocks,
)
from lit_shortcut.trajectory.sidecar import Sidecar, checksum

_BLOCK = tarfile.BLOCKSIZE
_ENDINGS = ("safetensors", "json")
_LIMITS = {"json": 2**20}  # bytes; a prompt is the longest part


class Head(NamedTuple):
    """A sample without its features: ``tensors`` by name, ``num_rows`` (S), and where each step's bytes lie."""

    tensors: dict[str, Tensor]
    num_rows: int
    steps: list[list[Range]]


class Shard:
    """An open shard of a set in a local folder; its file is closed with the last use of the object.

    Args:
        path: of the tar; its sidecar lies beside it.
        index: number of the shard.
        card: of the set.
        where: what messages call the shard; a fetched one is called by its URL.

    Raises:
        TrajectoryError: if file or sidecar is missing, they do not fit one another, or the tar holds other members
            than the card tells.
    """

    def __init__(self, path: Path, index: int, card: Card, where: str | None = None) -> None:
        self.where, self._card, self._index = where or str(path), card, index
        self._heads: dict[int, Head] = {}
        self._sidecar = Sidecar.read(str(path.with_suffix(".json")), index, card)
        try:
            self._file = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise TrajectoryError(f"{self.where}: no readable shard ({error.strerror})") from error
        finalize(self, os.close, self._file)
        size = os.fstat(self._file).st_size
        if size != self._sidecar.bytes:
            raise TrajectoryError(
                f"{self.where}: its size differs from {path.with_suffix('.json').name}: "
                f"expected {self._sidecar.bytes} bytes, found {size}"
            )
        self._members = list(self._scan(size))

    def head(self, row: int) -> Head:
        """The sample at ``row`` in the shard, without its features; kept once read.

        Raises:
            TrajectoryError: naming the sample, if it is damaged or does not fit the card.
        """
        if row not in self._heads:
            self._heads[row] = self._read_head(row)
        return self._heads[row]

    def read_steps(self, row: int, first: int, out: Encoded) -> None:
        """Copy consecutive steps of the sample at ``row`` into ``out``, (R, ≥ S, C), from step ``first`` of G · N.

        Raises:
            TrajectoryError: naming the sample, if its bytes are not those that were written, or are NaN.
        """
        head, (start, _) = self.head(row), self._members[row][0]
        stored = out.map(lambda part: part[:, : head.num_rows])
        parts = [stored.values] if stored.scales is None else [stored.values, stored.scales]
        sums, where = self._sidecar.checksums[row].steps, self._named(row)
        for step in range(len(out.values)):
            views = [bytes_of(part[step]) for part in parts]
            for view, (begin, _) in zip(views, head.steps[first + step], strict=True):
                self._read_into(view, start + begin)
            if checksum(*views) != sums[first + step]:
                raise TrajectoryError(
                    f"{where}: features at step {first + step}: checksum differs; the file is damaged"
                )
        require_finite_features(stored, where)

    def trajectory(self, row: int) -> Trajectory:
        """The whole sample at ``row``, decoded.

        Raises:
            TrajectoryError: naming the sample, if it is damaged or does not fit the card.
        """
        head, facts = self.head(row), self._facts(row)
        branches, num_steps, _, width = self._card.features_shape
        stored = empty_steps((branches * num_steps, head.num_rows, width), self._card.dtype)
        self.read_steps(row, 0, stored)
        features = stored.decode().unflatten(0, (branches, num_steps))
        prompt = facts["prompt"] if self._card.prompts else ""
        numbers = (facts["id"], facts["seed"], facts["label"])
        tensors = head.tensors
        texts = (tensors["text_lengths"], tensors["text_control"]) if self._card.prompts else (None, None)
        return Trajectory(*numbers, features, tensors["tokens"], tensors["committed_at"], prompt, *texts)

    def _scan(self, size: int) -> Iterator[tuple[Range, Range]]:
        """Bytes of each sample's two members, in the order of the card's ids; there are no others."""
        offset = 0
        for number in self._card.ids(self._index):
            ranges = []
            for ending in _ENDINGS:
                name, where = f"{number:08d}.{ending}", f"{self.where}: sample {number:08d}"
                try:
                    header = tarfile.TarInfo.frombuf(self._read(offset, offset + _BLOCK), "utf-8", "strict")
                except (tarfile.TarError, ValueError) as error:
                    raise TrajectoryError(f"{where}: expected member {name} at byte {offset} ({error})") from error
                if header.name != name or header.type != tarfile.REGTYPE:
                    raise TrajectoryError(f"{where}: expected member {name} at byte {offset}, found {header.name!r}")
                start = offset + _BLOCK
                if not 0 < header.size <= min(size - start, _LIMITS.get(ending, size)):
                    raise TrajectoryError(f"{where}: {name} declares {header.size} bytes in a shard of {size}")
                ranges.append((start, start + header.size))
                offset = start + -(-header.size // _BLOCK) * _BLOCK
            yield ranges[0], ranges[1]
        if any(self._read(offset, offset + _BLOCK)):
            raise TrajectoryError(f"{self.where}: expected no member behind sample {number:08d}, found one")

    def _read_head(self, row: int) -> Head:
        where, (start, stop) = self._named(row), self._members[row][0]
        members = parse_header(self._read(start, start + header_limit(stop - start)), stop - start, where)
        require_members(members, self._card, where)
        parts = {part: bytearray(self._read(*(start + at for at in part))) for part in rest_of(members)}
        if checksum(*parts.values()) != self._sidecar.checksums[row].rest:
            raise TrajectoryError(f"{where}: checksum differs outside the features; the file is damaged")
        tensors = {
            name: torch.frombuffer(content, dtype=one.dtype, count=prod(one.shape), offset=one.start - part[0]).view(
                one.shape
            )
            for part, content in parts.items()
            for name, one in members.items()
            if part[0] <= one.start and one.stop <= part[1]
        }
        num_rows = members["features"].shape[-2]
        require_values(tensors, num_rows, self._card, where)
        return Head(tensors, num_rows, step_blocks(members))

    def _facts(self, row: int) -> dict[str, Any]:
        where, content = self._named(row), self._read(*self._members[row][1])
        if checksum(content) != self._sidecar.checksums[row].facts:
            raise TrajectoryError(f"{where}: facts: checksum differs; the file is damaged")
        try:
            facts: dict[str, Any] = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise TrajectoryError(f"{where}: facts: expected JSON ({error})") from error
        names = {"id", "seed", "label"} | ({"prompt"} if self._card.prompts else set())
        number = self._card.ids(self._index)[row]
        kinds = {name: str if name == "prompt" else int for name in names}
        if (
            not isinstance(facts, dict)
            or {name: type(value) for name, value in facts.items()} != kinds
            or facts["id"] != number
            or not all(-(2**63) <= facts[name] < 2**63 for name in ("seed", "label"))
        ):
            raise TrajectoryError(
                f"{where}: facts: expected {', '.join(sorted(names))} of sample {number}, found {facts}"
            )
        return facts

    def _named(self, row: int) -> str:
        return f"{self.where}: sample {self._card.ids(self._index)[row]:08d}"

    def _read(self, start: int, stop: int) -> bytes:
        try:
            content = os.pread(self._file, stop - start, start)
        except OSError as error:
            raise TrajectoryError(f"{self.where}: not readable at byte {start} ({error.strerror})") from error
        if len(content) != stop - start:
            raise TrajectoryError(f"{self.where}: ends before byte {stop}; the shard is cut short")
        return content

    def _read_into(self, view: memoryview, start: int) -> None:
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self._file, [view[done:]], start + done)
            except OSError as error:
                raise TrajectoryError(
                    f"{self.where}: not readable at byte {start + done} ({error.strerror})"
                ) from error
            if not count:
                raise TrajectoryError(f"{self.where}: ends at byte {start + done}; the shard is cut short")
            done += count


def empty_steps(shape: tuple[int, ...], dtype: str) -> Encoded:
    """Room for features (…, S, C) as stored."""
    return Encoded(
        torch.empty(shape, dtype=DTYPES[dtype]), torch.empty(shape[:-1], dtype=SCALES) if dtype == "int8" else None
    )
