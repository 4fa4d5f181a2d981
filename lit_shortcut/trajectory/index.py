"""Index beside a shard: offset, size and checksum of every member in the tar."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from xxhash import xxh3_64

from lit_shortcut.files import read_bytes, whole
from lit_shortcut.trajectory.card import Card, TrajectoryError, shard_name

Member = tuple[int, int, str]
"""First byte in the tar, number of bytes and xxh3_64 (hex) of an array or of JSON."""


@dataclass(frozen=True)
class Index:
    """``shard-000000.json``: ``bytes`` and ``checksum`` (xxh3_64) of the whole shard, and its members.

    ``card`` is the digest of the set's card; ``samples`` holds each :data:`Member` by the sample's key and the member's
    ending. Members leave out numpy's header before an array.
    """

    card: str
    bytes: int
    checksum: str
    samples: dict[str, dict[str, Member]]

    def write(self, shard: Path) -> None:
        """Write the index beside ``shard`` atomically."""
        with whole(shard.with_suffix(".json")) as file:
            file.write(json.dumps(vars(self)).encode())

    @classmethod
    def read(cls, shard: Path, index: int, card: Card) -> Index:
        """Read the index beside ``shard``, which is number ``index`` of the set of ``card``.

        Raises:
            TrajectoryError: if it is missing, damaged, or of another set.
        """
        where = shard.with_suffix(".json")
        try:
            found = cls(**json.loads(read_bytes(str(where))))
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise TrajectoryError(f"{where}: expected the index of {shard_name(index)} ({error})") from error
        if found.card != card.digest:
            raise TrajectoryError(f"{where}: expected a shard of set {card.digest}, found one of {found.card}")
        return found


def checksum(content: bytes | memoryview) -> str:
    """Return the xxh3_64 of ``content`` in hex."""
    return xxh3_64(content).hexdigest()


def step_ending(branch: int, step: int, part: str) -> str:
    """Return the ending of a member with features of ``branch`` at ``step``: ``c03.npy``, ``u03.scales.npy``."""
    return f"{'cu'[branch]}{step:02d}.{part}"


def finished_shards(folder: Path, card: Card) -> dict[int, int]:
    """Return, by number, the size of each shard of ``card`` that is complete in ``folder``."""
    sizes = {path.name: path.stat().st_size for path in folder.glob("shard-*.tar")}
    finished = {}
    for number, name in enumerate(map(shard_name, range(card.num_shards))):
        with suppress(TrajectoryError):  # then it is not complete; reading it says why
            if name in sizes and Index.read(folder / name, number, card).bytes == sizes[name]:
                finished[number] = sizes[name]
    return finished


def check_shards(folder: Path, card: Card) -> None:
    """Raise a :class:`TrajectoryError` that names the first shard missing or cut short in ``folder``."""
    missing = sorted(set(range(card.num_shards)) - finished_shards(folder, card).keys())
    if missing:
        raise TrajectoryError(
            f"{folder / shard_name(missing[0])}: missing, or not of the size in its index; {len(missing)} of "
            f"{card.num_shards} shards are incomplete: finish recording the set"
        )
