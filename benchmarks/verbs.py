"""The project's verbs, as a user runs them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml


def run(*words: str) -> None:
    """Run ``lightning <words>`` in a process of its own."""
    subprocess.run([sys.executable, "-m", "lit_shortcut.cli", *words], check=True)  # noqa: S603 - our own verbs


def report(base: str, folder: Path, overlays: list[Path], model: dict[str, Any], data: dict[str, Any]) -> Any:
    """Run ``test`` on ``base`` and return what ``report.json`` in ``folder`` then says; finished rows are kept.

    Args:
        base: folder of configs, whose ``evaluate.yaml`` comes first.
        folder: results; the last YAML is written beside it.
        overlays: YAMLs that come second.
        model: arguments of the task that come last.
        data: arguments of the datamodule that come last.
    """
    folder = folder.resolve()
    last = folder.with_suffix(".yaml")
    last.parent.mkdir(parents=True, exist_ok=True)
    model = model | {"results": str(folder)}
    last.write_text(yaml.safe_dump({"model": {"init_args": model}, "data": {"init_args": data}}))
    configs = [Path("configs") / base / "evaluate.yaml", *overlays, last]
    run("test", *(f"--config={path}" for path in configs), "--trainer.logger=false")
    return json.loads((folder / "report.json").read_text())
