"""Writing shards as WebDataset reads them, a few steps at a time."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from xxhash import xxh3_64

from lit_shortcut.contracts import Trajectories
from lit_shortcut.files import whole
from lit_shortcut.trajectory.card import Card, TrajectoryError, shard_name
from lit_shortcut.trajectory.encoding import require_finite
from lit_shortcut.trajectory.index import Index, Member, checksum, step_ending

_AT_ONCE = 2**22  # bytes of features encoded together, at least one step


def write_shard(folder: Path, index: int, trajectories: Trajectories, card: Card) -> None:
    """Write ``trajectories``, all samples of shard ``index``, to ``folder`` atomically.

    Trajectories lie in the host's memory, or in a file mapped there; equal ones give equal bytes. Only a few steps are
    copied at a time.

    Raises:
        TrajectoryError: if ``trajectories`` are not the shard's samples, do not fit ``card`` or are not finite.
        AccessError: if the file cannot be written.
    """
    path = folder / shard_name(index)
    ids = trajectories.conditions.ids.tolist()
    if ids != list(card.ids(index)):
        raise TrajectoryError(f"{path}: expected samples {card.ids(index)}, got {ids}")
    samples: dict[str, dict[str, Member]] = {}
    with whole(path) as file:
        tar = _Tar(file)
        for row, key in enumerate(f"{number:08d}" for number in ids):
            samples[key] = {}
            try:
                for ending, header, content in _members(trajectories, row, card):
                    end = tar.add(f"{key}.{ending}", header, content)
                    samples[key][ending] = (end - len(content), len(content), checksum(content))
            except ValueError as error:
                raise TrajectoryError(f"{path}: sample {key}: {error}") from error
        tar.finish()
        # before the shard is renamed into place: a shard that is there has its index
        Index(card.digest, tar.size, tar.digest.hexdigest(), samples).write(path)


def require_values(grids: dict[str, Tensor], rows: list[int], lengths: list[int], card: Card) -> None:
    """Raise a :class:`ValueError` unless ``grids`` and each branch's ``rows`` and text ``lengths`` fit ``card``."""
    for name, end in (("tokens", card.spec["codebook_size"]), ("committed_at", card.num_steps)):
        low, high = (int(bound) for bound in torch.aminmax(grids[name]))
        if low < 0 or high >= end:
            raise ValueError(f"{name}: expected values in 0..{end - 1}, found {low}..{high}")
    frames = {own - length for own, length in zip(rows, lengths, strict=True)}
    longest = card.spec["sequence_length"]
    if len(frames) > 1 or max(rows) > longest or (not card.text_rows and rows != [longest] * card.branches):
        least = f"{min(frames)} rows and those of texts" if card.text_rows else f"{longest} rows"
        raise ValueError(f"features: expected {least} in each of {card.branches} branches, found {rows}")


def _members(trajectories: Trajectories, row: int, card: Card) -> Iterator[tuple[str, bytes, bytes]]:
    """Yield ending, header and content of the members of one sample, without the padding of its batch."""
    features, prefix, prompts = trajectories.features[row], trajectories.prefix, trajectories.conditions.prompts
    if (prefix is not None) != card.text_rows or bool(prompts) != bool(card.prompts):
        raise ValueError(f"expected text_rows: {card.text_rows}, prompts: {bool(card.prompts)} by the card")
    if features.shape[1::2] != (card.num_steps, card.spec["width"]):
        raise ValueError(f"features: expected {card.num_steps} steps of {card.spec['width']}, found {features.shape}")
    others = {"tokens": trajectories.tokens[row].int(), "committed_at": trajectories.committed_at[row].short()}
    lengths = torch.zeros(len(features), dtype=torch.int32)
    rows = lengths + features.shape[2]
    if prefix is not None:
        lengths = prefix.lengths[row].int()
        rows += lengths - prefix.control.shape[-2]
        others["prefix.lengths"] = lengths
        others["prefix.control"] = prefix.control[row, 0, : int(prefix.num_control[row, 0])].float()
        require_finite("prefix.control", others["prefix.control"])
    require_values(others, rows.tolist(), lengths.tolist(), card)
    for branch, own in enumerate(rows.tolist()):
        steps = features[branch, :, :own]
        at_once = max(1, _AT_ONCE // max(1, steps[0].nbytes))
        for first in range(0, card.num_steps, at_once):
            parts = card.encoder.encode(steps[first : first + at_once])
            card.encoder.check(parts)
            arrays = {part: _array(values) for part, values in parts.items()}
            for step in range(len(steps[first : first + at_once])):
                for part, array in arrays.items():
                    yield step_ending(branch, first + step, part), *_npy(array[step])
    for name, tensor in others.items():
        yield f"{name}.npy", *_npy(_array(tensor))
    names = zip(("id", "seed", "label"), trajectories.conditions[:3], strict=True)
    facts = {name: int(column[row]) for name, column in names} | ({"prompt": prompts[row]} if prompts else {})
    yield "json", b"", json.dumps(facts).encode()


def _array(tensor: Tensor) -> np.ndarray[Any, Any]:
    """Return ``tensor`` in numpy, as unsigned integers if numpy lacks its dtype."""
    try:
        return tensor.numpy()
    except TypeError:
        return tensor.contiguous().view(torch.uint8).numpy().view(f"u{tensor.itemsize}")


def _npy(array: np.ndarray[Any, Any]) -> tuple[bytes, bytes]:
    """Return numpy's header and the bytes of ``array``."""
    return _header(array.dtype.str, array.shape), array.tobytes()


@lru_cache(maxsize=64)
def _header(descr: str, shape: tuple[int, ...]) -> bytes:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": descr, "fortran_order": False, "shape": shape})
    return header.getvalue()


class _Tar:
    """Archive in ``file`` whose bytes are counted and hashed (xxh3_64).

    The bytes are those of WebDataset's ``TarWriter``, which hands them on in pieces of 10 KB: features by the gigabyte
    took half as long again.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.size, self.digest = file, 0, xxh3_64()

    def add(self, name: str, *parts: bytes) -> int:
        """Add a member ``name`` with the content ``parts``; return where that ends."""
        info = tarfile.TarInfo(name)
        info.size = sum(map(len, parts))
        for part in (info.tobuf(tarfile.USTAR_FORMAT), *parts):
            self._write(part)
        end = self.size
        self._write(bytes(-end % tarfile.BLOCKSIZE))
        return end

    def finish(self) -> None:
        """Write the end of the archive."""
        self._write(bytes(2 * tarfile.BLOCKSIZE))
        self._write(bytes(-self.size % tarfile.RECORDSIZE))

    def _write(self, content: bytes) -> None:
        self.digest.update(content)
        self.size += len(content)
        self._file.write(content)
