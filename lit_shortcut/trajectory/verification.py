"""Check a whole set: every byte against its checksum, every sample against the card and the others."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from xxhash import xxh3_64

from lit_shortcut.trajectory.card import Card
from lit_shortcut.trajectory.files import TrajectoryError, is_remote, shard_name
from lit_shortcut.trajectory.index import numbered
from lit_shortcut.trajectory.interface_file import load_interface
from lit_shortcut.trajectory.reading import Shard
from lit_shortcut.trajectory.source import Source
from lit_shortcut.weights import WeightsError


def problems(source: str | Path, cache: Path | None = None) -> Iterator[str]:
    """What is wrong with the set at folder or URL prefix ``source``, each with its file; nothing of a sound set.

    A damaged shard is named once, by its checksum, and each of its damaged samples after it. Shards of a URL come into
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
        strangers = [path for path, number in numbered(Path(source), card).items() if number is None]
        yield from (f"{path}: no shard of this set, which has {card.num_shards}" for path in strangers)
    opened = Source(source, card, kept=1, cache=cache)
    frames: set[int] = set()
    for index in range(card.num_shards):
        try:
            yield from opened.read(index, partial(_whole, path=opened.folder / shard_name(index)))
        except TrajectoryError as error:
            yield str(error)
            continue
        for row, number in enumerate(card.ids(index)):
            try:
                frames.add(opened.read(index, partial(_frame, row=row)))
            except TrajectoryError as error:
                yield str(error)
            if len(frames) > 1:
                yield f"{opened.source}/{shard_name(index)}: sample {number:08d}: other rows beside its text than before"
                frames.clear()


def _whole(shard: Shard, path: Path) -> list[str]:
    """What is wrong with the shard as a file."""
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, xxh3_64).hexdigest()
    except OSError as error:
        return [f"{shard.where}: not readable ({error.strerror})"]
    return [] if digest == shard.index.checksum else [f"{shard.where}: its checksum differs from {path.stem}.json"]


def _frame(shard: Shard, row: int) -> int:
    """Rows of the sample at ``row`` beside its text; the whole sample is checked."""
    found = shard.trajectory(row)
    return found.features.shape[-2] - (0 if found.text is None else int(found.text.lengths.max()))
