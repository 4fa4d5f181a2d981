"""Reads back an offline W&B run: LevelDB's log framing around protobuf records."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from wandb.proto.wandb_internal_pb2 import Record

_FILE_HEADER = struct.Struct("<4sHB")
_CHUNK_HEADER = struct.Struct("<IHB")  # checksum, length, kind
_BLOCK = 32 * 1024  # a chunk never crosses a block's border; records are split instead
_PADDING, _WHOLE, _LAST = 0, 1, 4


class Axis(NamedTuple):
    """What a metric is plotted over, and the statistics of it kept in the summary."""

    step: str
    summary: set[str]


class Run(NamedTuple):
    folder: Path
    project: str
    config: dict[str, Any]
    history: list[dict[str, Any]]
    axes: dict[str, Axis]
    files: list[str]
    artifacts: dict[str, set[str]]
    """Names of their files."""

    def series(self, name: str) -> dict[int, Any]:
        """Values of metric ``name`` by optimiser step."""
        return {row["trainer/global_step"]: row[name] for row in self.history if name in row}


def records(path: Path) -> Iterator[Record]:
    """The records of a ``.wandb`` file, in order."""
    content = path.read_bytes()
    if _FILE_HEADER.unpack_from(content) != (b":W&B", 0xBEE1, 0):
        raise ValueError(f"{path}: no W&B run")
    position, parts = _FILE_HEADER.size, b""
    while position + _CHUNK_HEADER.size <= len(content):
        rest = _BLOCK - position % _BLOCK
        _, length, kind = _CHUNK_HEADER.unpack_from(content, position)
        if rest < _CHUNK_HEADER.size or kind == _PADDING:
            position += rest
            continue
        start = position + _CHUNK_HEADER.size
        position = start + length
        parts += content[start:position]
        if kind in (_WHOLE, _LAST):
            yield Record.FromString(parts)
            parts = b""


def read_run(folder: Path) -> Run:
    """The run in ``folder``, an ``offline-run-…``."""
    (path,) = folder.glob("*.wandb")
    run = Run(folder, "", {}, [], {}, [], {})
    for record in records(path):
        match record.WhichOneof("record_type"):
            case "run":
                run = run._replace(project=record.run.project)
                run.config.update(_values(record.run.config.update))
            case "config":
                run.config.update(_values(record.config.update))
            case "history":
                run.history.append(_values(record.history.item))
            case "metric":
                metric = record.metric
                kept = {field.name for field, _ in metric.summary.ListFields()}
                run.axes[metric.name or metric.glob_name] = Axis(metric.step_metric, kept)
            case "request" if record.request.WhichOneof("request_type") == "log_artifact":
                artifact = record.request.log_artifact.artifact
                run.artifacts[artifact.name] = {entry.path for entry in artifact.manifest.contents}
            case "artifact":
                run.artifacts[record.artifact.name] = {entry.path for entry in record.artifact.manifest.contents}
            case "files":
                run.files.extend(file.path for file in record.files.files)
    return run


def _values(items: Iterable[Any]) -> dict[str, Any]:
    return {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}
