"""Files: written atomically, read from paths and URLs, folders locked."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs

_BUFFER = 2**20  # bytes; archives are written in small pieces
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}


class AccessError(OSError):
    """A file cannot be fetched or written, whatever its content."""


def is_remote(where: str | Path) -> bool:
    """Return whether ``where`` is a URL rather than a path."""
    return "://" in str(where)


def read_bytes(where: str) -> bytes:
    """Content of the small file at path or URL ``where``.

    Raises:
        OSError: if it is a path and cannot be read.
        AccessError: if it is a URL and cannot be fetched.
    """
    if not is_remote(where):
        return Path(where).read_bytes()
    with _remote(where) as (files, path):
        content: bytes = files.cat_file(path)
    return content


def fetch(url: str, path: Path) -> None:
    """Copy the file at ``url`` to ``path`` atomically; raises :class:`AccessError` if that fails."""
    with _remote(url) as (files, name), replacing(path) as aside:
        files.get_file(name, str(aside))


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``, whose folder is created; rename it to ``path`` if the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield aside
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def whole(path: Path) -> Iterator[BinaryIO]:
    """Open a file that appears at ``path`` if the block succeeds, and leaves nothing otherwise.

    It is written aside, synced to the disk and renamed, so that a kill or a power failure never leaves part of it under
    its name.

    Raises:
        AccessError: if it cannot be written.
    """
    try:
        with replacing(path) as aside, aside.open("wb", buffering=_BUFFER) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except AccessError:  # about another file, written within the block
        raise
    except OSError as error:
        raise AccessError(f"{path}: cannot be written ({error.strerror or error})") from error


@contextmanager
def exclusive(folder: Path, *, wait: bool) -> Iterator[None]:
    """Hold an exclusive lock on ``folder``, which is released even by a kill.

    Raises:
        BlockingIOError: if another process or thread holds it and ``wait`` is false.
        AccessError: if the folder's file system has no locks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise
        except OSError as error:
            raise AccessError(
                f"{folder}: cannot be locked ({error.strerror or error}); expected a folder on a file system with "
                "locks, such as a local disk"
            ) from error
        yield


@contextmanager
def _remote(url: str) -> Iterator[tuple[AbstractFileSystem, str]]:
    """Yield the file system of ``url`` and the path in it."""
    protocol = url.partition("://")[0]
    try:
        yield url_to_fs(url)
    except ImportError as error:
        way_out = f"pip install 'lit-shortcut[{_EXTRAS[protocol]}]'" if protocol in _EXTRAS else error
        raise AccessError(f"{url}: {protocol}:// needs a package that is not installed: {way_out}") from error
    except Exception as error:  # every file system has errors of its own
        raise AccessError(f"{url}: cannot be fetched ({type(error).__name__}: {error})") from error
