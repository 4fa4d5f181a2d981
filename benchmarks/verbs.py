"""The project's verbs, as a user runs them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml

from lit_shortcut.files import replacing
from lit_shortcut.inputs import located
from lit_shortcut.metrics.parts import Part

_LONGEST_PATH = 255


def run(*words: str) -> None:
    """Run ``lit-shortcut <words>`` in a process of its own."""
    subprocess.run([sys.executable, "-m", "lit_shortcut.cli", *words], check=True)  # noqa: S603 - our own verbs


def report(
    base: str, folder: Path, overlays: list[Path], model: dict[str, Any], data: dict[str, Any], *words: str
) -> Any:
    """Run ``test`` on ``base`` and return what ``report.json`` in ``folder`` then says; finished rows are kept.

    Args:
        base: folder of configs, whose ``evaluate.yaml`` comes first.
        folder: results; the last YAML is written beside it.
        overlays: YAMLs that come second.
        model: arguments of the task that come last.
        data: arguments of the datamodule that come last.
        words: further arguments of the command line.
    """
    folder = folder.resolve()
    arguments = {"model": {"init_args": model | {"results": str(folder)}}, "data": {"init_args": data}}
    configs = [*configs_of(base, overlays), _beside(folder, arguments)]
    run("test", *(f"--config={path}" for path in configs), "--trainer.logger=false", *words)
    return json.loads((folder / "report.json").read_text())


def bench(base: str, path: Path, model: dict[str, Any], *words: str) -> dict[str, dict[str, Part]]:
    """Run ``test`` on ``base`` with its ``bench.yaml``; return the parts by row and name, as written to ``path``.

    ``model`` are arguments of the task that come last, ``words`` further arguments of the command line.
    """
    path = path.resolve()
    last = _beside(path, {"model": {"init_args": model | {"path": str(path)}}})
    run("test", f"--config=configs/{base}/bench.yaml", f"--config={last}", *words)
    rows = json.loads(path.read_text())["rows"]
    return {row: {part["name"]: Part(**part) for part in parts} for row, parts in rows.items()}


def _beside(path: Path, arguments: dict[str, Any]) -> Path:
    """Write ``arguments`` to a YAML beside ``path``, and return it."""
    last = path.with_suffix(".yaml")
    last.parent.mkdir(parents=True, exist_ok=True)
    last.write_text(yaml.safe_dump(arguments))
    return last


def configs_of(base: str, overlays: list[Path]) -> list[Path]:
    """Return the YAMLs of :func:`report` that are the user's."""
    return [Path("configs") / base / "evaluate.yaml", *overlays]


def digests(arguments: Any, folder: Path | None = None) -> dict[str, str]:
    """Return the sha256 of every file that a string in ``arguments`` names, and of those that a YAML among them names.

    Within a YAML, in ``folder``, paths may be relative to it, and folders are results; elsewhere all files in a folder
    count.
    """
    if isinstance(arguments, dict | list):
        inner = arguments.values() if isinstance(arguments, dict) else arguments
        return {path: digest for value in inner for path, digest in digests(value, folder).items()}
    if not isinstance(arguments, str) or not arguments or len(arguments) > _LONGEST_PATH:
        return {}
    place = located(arguments) if folder is None or not (folder / arguments).exists() else folder / arguments
    files = sorted(place.rglob("*")) if folder is None and place.is_dir() else [place]
    found = {str(path): sha256(path.read_bytes()).hexdigest() for path in files if path.is_file()}
    if place.suffix == ".yaml" and place.is_file():
        found |= digests(yaml.safe_load(place.read_text()), place.parent)
    return found


def kept(path: Path, asked: Any, make: Callable[[], Any]) -> Any:
    """Return what ``make`` returned when the same was ``asked`` before, as JSON in ``path``; else make and keep it."""
    asked = json.loads(json.dumps(asked))  # as it is read again
    known = json.loads(path.read_text()) if path.exists() else [None]
    if known[0] != asked:
        known = [asked, make()]
        with replacing(path) as aside:
            aside.write_text(json.dumps(known, indent=1))
    return known[1]
