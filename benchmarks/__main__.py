"""``python -m benchmarks``: print the tables, write them to one JSON file."""

from __future__ import annotations

import json
import logging
import platform
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from jsonargparse import auto_cli

from benchmarks import loader, price, recording, training
from benchmarks.table import Table
from lit_shortcut.files import replacing
from lit_shortcut.metrics.latency import device_name

Name = Literal["loader", "recording", "price", "training"]
BENCHES: dict[Name, Callable[[], Table]] = {
    "loader": loader.measure,
    "recording": recording.measure,
    "price": price.measure,
    "training": training.measure,
}


def main(only: list[Name] | None = None, path: Path = Path("runs/bench_data.json")) -> None:
    """Measure the path of the data from base to training step.

    Args:
        only: benchmarks to run; all by default.
        path: JSON file to write; tables of benchmarks that are not run stay in it.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")  # Lightning's advice on small runs
    device = torch.device("cpu")
    machine = {"device": device_name(device), "threads": torch.get_num_threads(), "torch": torch.__version__}
    machine |= {"python": platform.python_version()}
    written = json.loads(path.read_text()) if path.exists() else {}
    for name in only or BENCHES:
        table = BENCHES[name]()
        print(table.markdown(), flush=True)  # noqa: T201 - what the command is for
        written[name] = table._asdict() | {"machine": machine}
        with replacing(path) as aside:
            aside.write_text(json.dumps(written, indent=2))


if __name__ == "__main__":
    auto_cli(main)
