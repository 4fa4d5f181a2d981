"""Verification of a whole set: every byte against its checksum, every sample against the card and the others."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from operator import methodcaller
from pathlib import Path
from tempfile import TemporaryDirectory

from xxhash import xxh3_64

from lit_shortcut.files import is_remote
from lit_shortcut.trajectory.card import Card, TrajectoryError, shard_name
from lit_shortcut.trajectory.interface_file import load_interface
from lit_shortcut.trajectory.source import Source
from lit_shortcut.weights import WeightsError


def problems(source: str | Path, cache: Path | None = None) -> Iterator[str]:
    """Yield every problem of the set at folder or URL prefix ``source``, with its file; none if the set is sound.

    A damaged shard is reported once, by its checksum, and then each of its damaged samples. Shards behind a URL are
    fetched one by one into ``cache``, by default into a temporary folder and not that of a training, whose shards would
    be taken for those behind the URL.
    """
    try:
        card = Card.read(source)
    except (TrajectoryError, OSError) as error:
        yield str(error)
        return
    try:
        load_interface(source, card)
    except (TrajectoryError, WeightsError, OSError) as error:
        yield str(error)
    known = {shard_name(index) for index in range(card.num_shards)}
    for path in [] if is_remote(source) else sorted(Path(source).glob("shard-*.tar")):
        if path.name not in known:
            yield f"{path}: not a shard of this set, which has {card.num_shards}"
    with TemporaryDirectory() as folder:
        yield from _problems_of_shards(Source(source, card, kept=1, cache=cache or Path(folder)))


def _problems_of_shards(opened: Source) -> Iterator[str]:
    card, frames = opened.card, set[int]()
    for index in range(card.num_shards):
        path = opened.folder / shard_name(index)
        try:
            expected = opened.read(index, lambda shard: shard.index).checksum
            with path.open("rb") as file:
                if hashlib.file_digest(file, xxh3_64).hexdigest() != expected:
                    yield f"{path}: its checksum differs from {path.stem}.json"
        except (TrajectoryError, OSError) as error:
            yield str(error)
            continue
        for row in range(len(card.ids(index))):
            try:
                found = opened.read(index, methodcaller("trajectory", row))
            except TrajectoryError as error:
                yield str(error)
                continue
            except OSError as error:  # fetching it again failed
                yield str(error)
                break
            frames.add(found.features.shape[-2] - (0 if found.prefix is None else int(found.prefix.lengths.max())))
            if len(frames) > 1:
                yield f"{path}: sample {int(found.conditions.ids):08d}: not as many rows beside its text as before"
                frames.clear()
