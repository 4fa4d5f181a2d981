"""The index beside a shard: where every member's content lies in the tar, and its checksum."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from xxhash import xxh3_64

from lit_shortcut.files import read_bytes, whole
from lit_shortcut.trajectory.card import Card, TrajectoryError, shard_name

Member = tuple[int, int, str]
"""Of an array, or of JSON: first byte in the tar, number of bytes, xxh3_64 in hex."""


@dataclass(frozen=True)
class Index:
    """``shard-000000.json``: ``bytes`` and ``checksum`` (xxh3_64) of the whole shard, and its members.

    ``card`` is the digest of the card that the shard belongs to; ``samples`` are :data:`Member` by the sample's key and
    the member's ending. numpy's header before an array belongs to no member.
    """

    card: str
    bytes: int
    checksum: str
    samples: dict[str, dict[str, Member]]

    def write(self, shard: Path) -> None:
        """Write it beside ``shard``, whole or not at all."""
        with whole(shard.with_suffix(".json")) as file:
            file.write(json.dumps(vars(self)).encode())

    @classmethod
    def read(cls, shard: Path, index: int, card: Card) -> Index:
        """The index beside ``shard``, number ``index``.

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
    """xxh3_64 of ``content`` in hex."""
    return xxh3_64(content).hexdigest()


def step_ending(branch: int, step: int, part: str) -> str:
    """Ending of the member with a part of the features of ``branch`` at ``step``: ``c03.npy``, ``u03.scales.npy``."""
    return f"{'cu'[branch]}{step:02d}.{part}"


def finished_shards(folder: Path, card: Card) -> dict[int, int]:
    """Size of each shard of ``card`` that lies in ``folder`` as it was written, by number."""
    sizes = {path.name: path.stat().st_size for path in folder.glob("shard-*.tar")}
    finished = {}
    for number, name in enumerate(map(shard_name, range(card.num_shards))):
        with suppress(TrajectoryError):  # not whole, which is what is asked; reading it says why
            if name in sizes and Index.read(folder / name, number, card).bytes == sizes[name]:
                finished[number] = sizes[name]
    return finished


def check_shards(folder: Path, card: Card) -> None:
    """Raise a :class:`TrajectoryError` that names the first shard missing or cut short in ``folder``."""
    missing = sorted(set(range(card.num_shards)) - finished_shards(folder, card).keys())
    if missing:
        raise TrajectoryError(
            f"{folder / shard_name(missing[0])}: missing, or not of the size that its index says; {len(missing)} of "
            f"{card.num_shards} shards are not whole: record the set to its end"
        )
