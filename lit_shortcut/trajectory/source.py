"""The shards of a set, open: those of a folder where they are, those behind a URL fetched into a bounded cache."""

from __future__ import annotations

import fcntl
import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lit_shortcut.trajectory.card import Card
from lit_shortcut.trajectory.files import TrajectoryError, is_remote, locate, opened, shard_name, whole
from lit_shortcut.trajectory.reading import Shard
from lit_shortcut.trajectory.sample import Trajectory
from lit_shortcut.trajectory.sidecar import Sidecar

CACHE = Path("~/.cache/lit-shortcut")
_OPEN = 64  # shards whose files and sample heads a thread keeps; some MB
_CHUNK = 2**20


class Source:
    """Shards of the set at ``source``, by number.

    Args:
        source: folder, or URL prefix that WebDataset opens.
        card: of the set.
        kept: shards of a URL that lie in the cache at most; the longest unused is deleted for the next.
        cache: folder of the cache, shared by all processes of the machine; a set has a folder of its own in it.
    """

    def __init__(self, source: str | Path, card: Card, *, kept: int = 32, cache: Path | None = None) -> None:
        self.source, self.card, self.kept, self.is_remote = source, card, kept, is_remote(source)
        self._open = min(_OPEN, kept) if self.is_remote else _OPEN  # what is open takes the disk's room, deleted or not
        name = hashlib.sha256(f"{source} {card.digest}".encode()).hexdigest()[:16]
        self.folder = (cache or CACHE).expanduser() / name if self.is_remote else Path(source)
        self._damaged: dict[int, str] = {}  # fetched shards that were not what they should be: not fetched again
        self._of_thread = threading.local()  # so that no thread waits for another, nor closes what it reads

    def shard(self, index: int) -> Shard:
        """Shard ``index``, open, fetched before where that is needed.

        Raises:
            TrajectoryError: if it is missing or damaged.
            AccessError: if it cannot be fetched.
        """
        kept: OrderedDict[int, Shard] = self._of_thread.__dict__.setdefault("open", OrderedDict())
        if index in kept:
            kept.move_to_end(index)
            return kept[index]
        if self.is_remote:
            with self._locked(shard_name(index)):
                self._fetch(index)
                shard = Shard(self._path(index), index, self.card, locate(self.source, shard_name(index)))
        else:
            shard = Shard(self._path(index), index, self.card)
        kept[index] = shard
        if len(kept) > self._open:
            kept.popitem(last=False)
        return shard

    def trajectories(self, index: int) -> Iterator[Trajectory]:
        """All samples of shard ``index``.

        Raises:
            TrajectoryError: if the shard or a sample is missing or damaged.
        """
        shard = self.shard(index)
        for row in range(len(self.card.ids(index))):
            yield shard.trajectory(row)

    def fetch(self, index: int) -> None:
        """Have shard ``index`` of a URL in the cache."""
        with self._locked(shard_name(index)):
            self._fetch(index)

    def _fetch(self, index: int) -> None:
        """Fetch the shard, whole and as its sha256 says, or not at all."""
        path, url = self._path(index), locate(self.source, shard_name(index))
        if index in self._damaged:
            raise TrajectoryError(self._damaged[index])
        with self._locked("room"):
            if path.exists():
                os.utime(path)  # so that whoever makes room next leaves it
                return
            self._make_room()
        sidecar = Sidecar.read(locate(self.source, path.with_suffix(".json").name), index, self.card)
        digest, size = hashlib.sha256(), 0
        with whole(path) as file:
            for chunk in _chunks(url, sidecar.bytes):
                size += len(chunk)
                digest.update(chunk)
                file.write(chunk)
            if size != sidecar.bytes or digest.hexdigest() != sidecar.sha256:
                self._damaged[index] = f"{url}: expected {sidecar.bytes} bytes of sha256 {sidecar.sha256}, found others"
                raise TrajectoryError(self._damaged[index])
            sidecar.write(path)

    def _make_room(self) -> None:
        held = sorted((path.stat().st_mtime, path) for path in self.folder.glob("shard-*.tar"))
        for _, path in held[: max(0, len(held) - self.kept + 1)]:
            path.unlink(missing_ok=True)  # whoever has it open reads on
            path.with_suffix(".json").unlink(missing_ok=True)

    @contextmanager
    def _locked(self, what: str) -> Iterator[None]:
        """Alone among all processes and threads with ``what`` in the cache: a shard, or its room."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f".{what}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _path(self, index: int) -> Path:
        return self.folder / shard_name(index)


def _chunks(url: str, limit: int) -> Iterator[bytes]:
    """Content of ``url``, and no more than a chunk beyond ``limit`` bytes of it."""
    size = 0
    with opened(url) as stream:
        while size <= limit and (chunk := stream.read(_CHUNK)):
            size += len(chunk)
            yield chunk


def read_shard(source: str | Path, index: int, card: Card) -> Iterator[Trajectory]:
    """All samples of shard ``index`` of the set at ``source``.

    Raises:
        TrajectoryError: if the shard or a sample is missing or damaged.
    """
    yield from Source(source, card).trajectories(index)
