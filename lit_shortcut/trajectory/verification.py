"""Check a whole set: every byte against its checksum, every sample against the card."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from lit_shortcut.trajectory.card import Card
from lit_shortcut.trajectory.files import TrajectoryError, is_remote, shard_name
from lit_shortcut.trajectory.interface_file import load_interface
from lit_shortcut.trajectory.sidecar import Sidecar
from lit_shortcut.trajectory.source import Source
from lit_shortcut.weights import WeightsError

_ABSENT = 1000


def problems(source: str | Path, cache: Path | None = None) -> Iterator[str]:
    """What is wrong with the set at folder or URL prefix ``source``, each with its file; nothing of a sound set.

    A damaged shard is told once, by its sha256, and each of its damaged samples after it. Shards of a URL come into
    ``cache``.
    """
    try:
        card = Card.read(source)
    except TrajectoryError as error:
        yield str(error)
        return
    try:
        load_interface(source, card)
    except (TrajectoryError, WeightsError) as error:
        yield str(error)
    if not is_remote(source):
        yield from _strangers(Path(source), card)
    opened = Source(source, card, kept=1, cache=cache)
    absent = 0  # a card may claim more shards than anyone wants to see listed
    for index in range(card.num_shards):
        path = opened.folder / shard_name(index)
        if is_remote(source) or path.exists():
            yield from _problems_of(opened, index, path)
            continue
        absent += 1
        yield f"{path}: no such shard"
        if absent == _ABSENT:
            yield f"{source}: {absent} of {card.num_shards} shards were missing when this check gave up"
            return


def _problems_of(source: Source, index: int, path: Path) -> Iterator[str]:
    try:
        shard = source.shard(index)
    except TrajectoryError as error:
        yield str(error)
        return
    sidecar = Sidecar.read(str(path.with_suffix(".json")), index, source.card)
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        yield f"{shard.where}: not readable ({error.strerror})"
        return
    if digest != sidecar.sha256:
        yield f"{shard.where}: its sha256 differs from {path.with_suffix('.json').name}"
    for row in range(len(source.card.ids(index))):
        try:
            shard.trajectory(row)
        except TrajectoryError as error:
            yield str(error)


def _strangers(folder: Path, card: Card) -> Iterator[str]:
    """Shards in ``folder`` that ``card`` does not count."""
    for path in sorted(folder.glob("shard-*.tar")):
        number = path.stem.removeprefix("shard-")
        if not number.isdecimal() or path.name != shard_name(int(number)) or int(number) >= card.num_shards:
            yield f"{path}: no shard of this set, which has {card.num_shards}"
