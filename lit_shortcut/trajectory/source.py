"""Open shards of a set: read in place from a folder, or fetched from a URL into a bounded cache."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from hashlib import sha256
from operator import methodcaller
from pathlib import Path
from typing import TypeVar

from lit_shortcut.background import Background
from lit_shortcut.contracts import Trajectories
from lit_shortcut.files import AccessError, exclusive, fetch, is_remote
from lit_shortcut.trajectory.card import Card, TrajectoryError, locate, shard_name
from lit_shortcut.trajectory.reading import Shard

_CACHE = Path("~/.cache/lit-shortcut")
Result = TypeVar("Result")


class Source:
    """Shards of the set of ``card`` at ``source``, a folder or a URL prefix that fsspec opens; ``kept`` stay open.

    Shards behind a URL are fetched into a folder below ``cache``, shared by all processes of the machine. It holds
    ``kept`` of them; the least recently used one makes room for the next.
    """

    def __init__(self, source: str | Path, card: Card, *, kept: int = 32, cache: Path | None = None) -> None:
        self.source, self.card, self.kept, self.is_remote = source, card, kept, is_remote(source)
        name = sha256(f"{source} {card.digest}".encode()).hexdigest()[:16]
        self.folder = (cache or _CACHE).expanduser() / name if self.is_remote else Path(source)
        self._shard = lru_cache(kept)(self._opened)  # open files, indices and sample heads, some MB
        self._again: set[int] = set()
        self._ahead: Background[None] = Background()

    def read(self, index: int, use: Callable[[Shard], Result]) -> Result:
        """Return ``use`` of shard ``index``. A shard that is damaged in the cache is fetched again, once.

        Raises:
            TrajectoryError: if it is missing or damaged.
            AccessError: if it cannot be fetched.
        """
        try:
            return use(self._shard(index))
        except TrajectoryError:
            if not self.is_remote:
                raise
        if index not in self._again:
            self._again.add(index)
            with exclusive(self.folder, wait=True):
                self._remove(self.folder / shard_name(index))
        self._shard.cache_clear()  # another thread may have fetched it again
        return use(self._shard(index))

    def trajectories(self, index: int) -> Iterator[Trajectories]:
        """Yield all samples of shard ``index``, each a batch of one; errors as in :meth:`read`."""
        for row in range(len(self.card.ids(index))):
            yield self.read(index, methodcaller("trajectory", row))

    def fetch_ahead(self, indices: Sequence[int]) -> None:
        """Fetch shards of a URL into the cache in the background, after those requested before."""
        deque(self._ahead.results(leave=len(indices)), maxlen=0)
        for index in indices:
            self._ahead.submit(self._fetch_quietly, index)

    def close(self) -> None:
        """Cancel fetching ahead."""
        self._ahead.close(cancel=True)

    def _opened(self, index: int) -> Shard:
        if self.is_remote:
            self._fetch(index)
        return Shard(self.folder / shard_name(index), index, self.card, locate(self.source, shard_name(index)))

    def _fetch_quietly(self, index: int) -> None:
        with suppress(AccessError):  # reading the shard raises the error again
            self._fetch(index)

    def _fetch(self, index: int) -> None:
        path = self.folder / shard_name(index)
        with suppress(FileNotFoundError):
            os.utime(path)  # mark it as recently used
            return
        with exclusive(self.folder, wait=True):  # ranks of a machine share the cache
            if path.exists():
                return
            held = sorted(self.folder.glob("shard-*.tar"), key=lambda held: held.stat().st_mtime)
            for oldest in held[: max(0, len(held) - self.kept + 1)]:
                self._remove(oldest)  # processes that have it open can still read it
            for part in self.folder.glob(".shard-*"):
                part.unlink()  # of a fetch that was killed
            for name in (path.with_suffix(".json").name, path.name):  # a shard that is there has its index
                fetch(locate(self.source, name), self.folder / name)

    def _remove(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        path.with_suffix(".json").unlink(missing_ok=True)


def read_shard(source: str | Path, index: int, card: Card) -> Iterator[Trajectories]:
    """Yield all samples of shard ``index`` of the set at ``source``, as :meth:`Source.trajectories` does."""
    yield from Source(source, card).trajectories(index)
