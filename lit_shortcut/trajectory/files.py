"""Files of a set: their names, opened where they are, written whole or not at all."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, BinaryIO

from webdataset.gopen import gopen


class TrajectoryError(ValueError):
    """A set of trajectories is missing, damaged, not writable, or not the one asked for."""


class AccessError(TrajectoryError):
    """A file cannot be fetched or written; this says nothing of what is in it."""


def shard_name(index: int) -> str:
    """File name of shard ``index``."""
    return f"shard-{index:06d}.tar"


def locate(source: str | Path, name: str) -> str:
    """Path or URL of file ``name`` of the set at ``source``.

    Raises:
        TrajectoryError: if ``source`` would have WebDataset run a command.
    """
    source = str(source)
    if source.startswith("pipe:") or "::" in source:
        raise TrajectoryError(f"{source}: expected a folder or a URL prefix; 'pipe:' and '::' are refused")
    return f"{source.rstrip('/')}/{name}"


def is_remote(source: str | Path) -> bool:
    """Whether ``source`` is a URL prefix and no folder."""
    return "://" in str(source)


@contextmanager
def opened(where: str) -> Iterator[IO[bytes]]:
    """The file at path or URL ``where``, to be read from its beginning.

    Raises:
        OSError: if it is a path and cannot be opened or read.
        AccessError: if it is a URL and cannot be fetched.
    """
    if not is_remote(where):
        with Path(where).open("rb") as file:
            yield file
        return
    try:
        stream = gopen(where)
    except ValueError as error:
        raise AccessError(
            f"{where}: WebDataset opens no such URL ({error}); the environment variable GOPEN_REWRITE can turn its "
            "beginning into another"
        ) from error
    try:
        with stream:
            yield stream
    except OSError as error:  # of WebDataset's, which names its whole command line and its streams
        command = re.search(r"\['(\w+)'.* exit (\d+)", str(error))
        reason = f"{command[1]} ended with exit code {command[2]}" if command else error
        raise AccessError(f"{where}: cannot be fetched ({reason})") from error


def read_small(where: str, limit: int) -> bytes:
    """Content of the file at path or URL ``where``.

    Raises:
        TrajectoryError: if it has more than ``limit`` bytes.
        AccessError: if it is a URL and cannot be fetched.
        OSError: if it cannot be opened or read.
    """
    with opened(where) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise TrajectoryError(f"{where}: expected at most {limit} bytes, found more")
    return content


def sync_folder(folder: Path) -> None:
    """Have the names in ``folder`` outlive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def whole(path: Path) -> Iterator[BinaryIO]:
    """A file that is at ``path`` once the block has ended well, and leaves nothing otherwise.

    Written aside, synchronised to the disk and renamed, so that a process killed at any moment leaves no part of it
    under its name.

    Raises:
        AccessError: if it cannot be written.
    """
    aside = path.with_name(f".{path.name}.tmp{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        sync_folder(path.parent)
    except OSError as error:
        raise AccessError(
            f"{path}: cannot be written ({error.strerror or error}). Finished shards remain valid; "
            "running the same command again goes on with the missing ones"
        ) from error
    finally:
        with suppress(OSError):
            aside.unlink()
