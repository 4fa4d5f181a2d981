"""Shards that hold what no writer writes, with indices that vouch for it."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

from xxhash import xxh3_64

from lit_shortcut.trajectory.card import shard_name

Members = dict[str, bytes]
_HEADER = 128  # bytes of numpy's


def forge(folder: Path, index: int, change: Callable[[Members], Members]) -> None:
    """Replace the members of shard ``index`` in ``folder`` by what ``change`` makes of them, checksums included."""
    path = folder / shard_name(index)
    with tarfile.open(path) as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar.getmembers()}  # type: ignore[union-attr]
    with tarfile.open(path, mode="w") as tar:
        for name, value in change(members).items():
            member = tarfile.TarInfo(name)
            member.size = len(value)
            tar.addfile(member, io.BytesIO(value))
    content, samples = path.read_bytes(), {}
    with tarfile.open(path) as tar:
        for member in tar.getmembers():
            key, _, ending = member.name.partition(".")
            header = _HEADER if ending.endswith("npy") else 0
            start, stop = member.offset_data + header, member.offset_data + member.size
            entry = start, stop - start, xxh3_64(content[start:stop]).hexdigest()
            samples.setdefault(key, {})[ending] = entry
    edit_index(folder, index, bytes=len(content), checksum=xxh3_64(content).hexdigest(), samples=samples)


def replaced(name: str, content: bytes) -> Callable[[Members], Members]:
    return lambda members: members | {name: content}


def edit_index(folder: Path, index: int, **changes: object) -> None:
    """Change keys of the index of shard ``index`` in ``folder``."""
    path = (folder / shard_name(index)).with_suffix(".json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
