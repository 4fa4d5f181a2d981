"""Shards that hold what no writer writes, with sidecars that vouch for it."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load, save
from torch import Tensor

from lit_shortcut.trajectory.card import Card
from lit_shortcut.trajectory.files import TrajectoryError, shard_name
from lit_shortcut.trajectory.sample import header_limit, parse_header, rest_of, step_blocks
from lit_shortcut.trajectory.sidecar import Checksums, Sidecar, checksum

Members = dict[str, bytes]


def forge(folder: Path, index: int, card: Card, change: Callable[[Members], Members]) -> None:
    """Replace the members of shard ``index`` in ``folder`` by what ``change`` makes of them, checksums included."""
    path = folder / shard_name(index)
    with tarfile.open(path) as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar.getmembers()}  # type: ignore[union-attr]
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for name, value in (changed := change(members)).items():
            member = tarfile.TarInfo(name)
            member.size = len(value)
            tar.addfile(member, io.BytesIO(value))
    path.write_bytes(content.getvalue())
    sums = [_checksums(changed, number, card) for number in card.ids(index)]
    Sidecar(card.digest, path.stat().st_size, hashlib.sha256(content.getvalue()).hexdigest(), sums).write(path)


def with_tensors(sample: str, change: Callable[[dict[str, Tensor]], object]) -> Callable[[Members], Members]:
    """Change the tensors of ``sample`` in place."""

    def changed(members: Members) -> Members:
        tensors = load(members[f"{sample}.safetensors"])
        change(tensors)
        return members | {f"{sample}.safetensors": save(tensors)}

    return changed


def _checksums(members: Members, number: int, card: Card) -> Checksums:
    sample, facts = (members.get(f"{number:08d}.{ending}", b"") for ending in ("safetensors", "json"))
    try:
        found = parse_header(sample[: header_limit(len(sample))], len(sample), "")
        steps = [checksum(*(sample[start:stop] for start, stop in block)) for block in step_blocks(found)]
        rest = checksum(*(sample[start:stop] for start, stop in rest_of(found)))
    except (TrajectoryError, KeyError):
        rest, steps = "", []
    count = card.branches * card.num_steps
    return Checksums(checksum(facts), rest, (steps + [""] * count)[:count])


def edit_sidecar(folder: Path, index: int, **changes: object) -> None:
    """Change keys of the sidecar of shard ``index`` in ``folder``."""
    path = (folder / shard_name(index)).with_suffix(".json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
