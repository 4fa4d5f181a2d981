"""Write shards, and tell which of a set are there."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from lit_shortcut.contracts import Trajectories
from lit_shortcut.trajectory.card import Card
from lit_shortcut.trajectory.files import TrajectoryError, shard_name, whole
from lit_shortcut.trajectory.sidecar import Checksums, Sidecar, checksum
from lit_shortcut.trajectory.stored import StoredSample

_CHUNK = 2**20  # bytes written at a time


def write_shard(folder: Path, index: int, trajectories: Trajectories, card: Card) -> None:
    """Write ``trajectories``, all samples of shard ``index``, to ``folder``: whole or not at all.

    Equal trajectories give equal bytes, wherever their features lie. Of memory it takes what a few steps do.

    Raises:
        TrajectoryError: if they are not the shard's samples, do not fit ``card``, are not finite, or if the file cannot
            be written.
    """
    path = folder / shard_name(index)
    ids = trajectories.conditions.ids.tolist()
    if ids != list(card.ids(index)):
        raise TrajectoryError(f"{path}: expected samples {card.ids(index)}, got {ids}")
    with whole(path) as file:
        hashing, checksums = _Hashing(file), []
        with tarfile.open(fileobj=hashing, mode="w", format=tarfile.GNU_FORMAT, copybufsize=_CHUNK) as tar:  # type: ignore[call-overload]  # only writes
            for row, number in enumerate(ids):
                where = f"{path}: sample {number}"
                stored = StoredSample(trajectories, row, card, where)
                facts = json.dumps(_facts(trajectories, row)).encode()
                _add(tar, f"{number:08d}.safetensors", stored.size, stored.open())
                _add(tar, f"{number:08d}.json", len(facts), io.BytesIO(facts))
                checksums.append(Checksums(checksum(facts), stored.rest, stored.steps))
        sidecar = Sidecar(card.digest, hashing.size, hashing.sha256.hexdigest(), checksums)
        sidecar.write(path)  # before the shard, whose presence says that both are there


def finished_shards(folder: Path, card: Card) -> set[int]:
    """Shards of ``card`` that lie in ``folder`` with the size they were written with."""
    return {index for index, _ in _finished(folder, card)}


def is_complete(folder: Path, card: Card) -> bool:
    """Whether all shards of ``card`` lie in ``folder``."""
    return len(finished_shards(folder, card)) == card.num_shards


def recorded_bytes(folder: Path, card: Card) -> int:
    """Size of the finished shards in ``folder``."""
    return sum(size for _, size in _finished(folder, card))


def check_shards(folder: Path, card: Card) -> None:
    """Raise a :class:`TrajectoryError` that names the first shard missing or cut short in ``folder``."""
    finished = finished_shards(folder, card)
    missing = card.num_shards - len(finished)
    if not missing:
        return
    index = next(index for index in range(card.num_shards) if index not in finished)
    path = folder / shard_name(index)
    problem = "no such shard"
    if path.exists():
        sidecar = Sidecar.read(str(path.with_suffix(".json")), index, card)
        problem = f"its size differs from {path.with_suffix('.json').name}: expected {sidecar.bytes} bytes"
    raise TrajectoryError(
        f"{path}: {problem}; {missing} of {card.num_shards} shards are not whole: record the set to its end"
    )


def remove_shards(folder: Path) -> None:
    """Delete all shards in ``folder``."""
    for path in sorted(folder.glob("shard-*")):
        path.unlink()


def remove_leftovers(folder: Path) -> None:
    """Delete what runs that were killed left aside in ``folder``; no other may be writing there."""
    for path in folder.glob(".*.tmp*"):
        path.unlink()


class _Hashing:
    """Passes on what is written to ``file`` and knows its size and sha256."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.size, self.sha256 = file, 0, hashlib.sha256()

    def write(self, content: bytes) -> int:
        self.sha256.update(content)
        self.size += len(content)
        return self._file.write(content)

    def tell(self) -> int:
        return self.size


def _finished(folder: Path, card: Card) -> Iterator[tuple[int, int]]:
    """Number and size of each shard of ``card`` that is in ``folder`` with the size it was written with."""
    for path in sorted(folder.glob("shard-*.tar")):
        number = path.stem.removeprefix("shard-")
        if not number.isdecimal() or int(number) >= card.num_shards or path.name != shard_name(int(number)):
            continue
        try:
            sidecar = Sidecar.read(str(path.with_suffix(".json")), int(number), card)
        except TrajectoryError:  # not whole, which is what is asked; reading it says why
            continue
        if path.stat().st_size == sidecar.bytes:
            yield int(number), sidecar.bytes


def _facts(trajectories: Trajectories, row: int) -> dict[str, int | str]:
    conditions = trajectories.conditions
    facts: dict[str, int | str] = {
        name: int(column[row]) for name, column in zip(("id", "seed", "label"), conditions[:3], strict=True)
    }
    return facts if trajectories.prefix is None else facts | {"prompt": conditions.prompts[row]}


def _add(tar: tarfile.TarFile, name: str, size: int, content: BinaryIO) -> None:
    member = tarfile.TarInfo(name)  # time and owner 0, mode 0644, whoever writes
    member.size = size
    tar.addfile(member, content)
