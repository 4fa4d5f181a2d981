"""What acceleration is worth on this machine's device: both published systems with random weights, in ten minutes.

``make gpu`` writes Markdown and JSON named after the device, again after each table: a run that is cut leaves what it
measured. No figure of quality comes from random weights.
"""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from jsonargparse import auto_cli
from lightning.fabric.utilities import move_data_to_device
from torch import nn

from benchmarks.recording import PLAIN, time_recording
from benchmarks.systems import Scale, System, systems
from benchmarks.table import Table
from benchmarks.training import Trained
from datamodules.conditions import ClassLabels, InTurn
from datamodules.prompts import Prompts
from lit_shortcut.acceleration.accelerated import Accelerated, Past, Vanilla
from lit_shortcut.acceleration.plans import Even
from lit_shortcut.acceleration.replay import RecordedEnds
from lit_shortcut.acceleration.shortcut import Shortcut
from lit_shortcut.contracts import Acceleration, Conditions, MaskedImageModel, Trajectories
from lit_shortcut.files import replacing
from lit_shortcut.losses import MaskedMSE
from lit_shortcut.metrics.latency import device_name, measure_latency
from lit_shortcut.networks.shortcut import ShortcutNetwork
from lit_shortcut.precision import has_native_bfloat16
from lit_shortcut.sampling import generate, sample
from lit_shortcut.tasks.recording import record
from lit_shortcut.tasks.shortcut import ShortcutTask
from lit_shortcut.trajectory.transitions import select

_BASE, _SHORTCUT = "base", "shortcut"
_LARGEST_BATCH = 512  # pairs
_TRAINED_ON = 8  # images at most


def main(scale: Scale = "published", folder: Path = Path("benchmarks/results")) -> None:
    """Measure the systems at ``scale`` on the GPU, or on the CPU where there is none.

    Args:
        scale: sizes; ``tiny`` tries the path in seconds.
        folder: for the report and its numbers; those of the same device are replaced.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")  # Lightning's advice on small runs
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if has_native_bfloat16() else torch.float32
    machine = {"device": device_name(device), "dtype": str(dtype).removeprefix("torch."), "torch": torch.__version__}
    path = folder / re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-")
    tables: list[Table] = []
    print(f"# {machine['device']}\n", flush=True)  # noqa: T201 - what the command is for
    for system in systems(scale):
        for table in measure(system, device, dtype):
            tables.append(table)
            print(table.markdown(), flush=True)  # noqa: T201 - a table as soon as it is measured: the next takes minutes
            _write(path, machine, tables)
    print(f"{_facts(machine)}\nwritten to {path}.md and {path}.json")  # noqa: T201


def measure(system: System, device: torch.device, dtype: torch.dtype) -> Iterator[Table]:
    """Tables of one system: decoding, recording and training."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    base, network = system.base(device), system.network().eval().requires_grad_(False)
    assert isinstance(base, nn.Module)
    base.to(device, dtype)
    network.to(device, dtype)
    peak = partial(torch.cuda.max_memory_allocated, device) if device.type == "cuda" else None
    yield decoding_table(system, base, network, device, peak)
    precision = "bf16-true" if dtype == torch.bfloat16 else "32-true"
    yield recording_table(system, base, device, precision)
    asked: Conditions = move_data_to_device(system.conditions(min(_TRAINED_ON, system.num_recorded)), device)
    with torch.inference_mode():
        trajectories = record(base, asked, system.decoding.at(system.recorded_steps))
    task = ShortcutTask(system.network(), losses={"mse": MaskedMSE(rows=system.loss_rows)})
    task.use(RecordedEnds(base.spec, base.interface, "random"))
    del base, network  # what is trained must not depend on the room that they take
    yield training_table(system.name, task, trajectories, device, dtype)


def decoding_table(
    system: System,
    base: MaskedImageModel,
    network: ShortcutNetwork,
    device: torch.device,
    peak: Callable[[], int] | None = None,
) -> Table:
    """Latency of vanilla and of each (N, b), one pass of base and shortcut, and the share of time outside both."""
    conditions: Conditions = move_data_to_device(system.conditions(system.batch_size), device)
    num_steps = system.decoding.num_steps
    methods: dict[tuple[int, int], Acceleration] = {(num_steps, num_steps): Vanilla()}
    methods |= {(n, b): Accelerated(Even(b), Shortcut(network)) for n, b in system.paper}
    runs: dict[str, Callable[[], object]] = passes(system, base, network, conditions)
    runs |= {
        f"{n}, {b}": partial(generate, base, conditions, system.decoding.at(n), method)
        for (n, b), method in methods.items()
    }
    timed = measure_latency(runs, device, system.batch_size, system.rounds)
    ms = {name: latency.median_ms for name, latency in timed.items()}
    vanilla = ms[f"{num_steps}, {num_steps}"]
    rows: list[dict[str, Any]] = []
    for n, b in methods:
        whole = ms[f"{n}, {b}"]
        inside = b * ms[_BASE] + (n - b) * ms[_SHORTCUT]
        rows.append(
            {
                "N, b": f"{n}, {b}",
                "ms an image": whole,
                "speed-up": vanilla / whole,
                "paper's": system.paper.get((n, b)),
                "outside both, %": 100 * (1 - inside / whole),
            }
        )
    memory = "" if peak is None else f" Peak memory {peak() / 1e9:.3g} GB."
    note = (
        f"Batch {system.batch_size}, medians of {system.rounds} rounds in turns. An image's share of a pass: base "
        f"{ms[_BASE]:.3g} ms, shortcut {ms[_SHORTCUT]:.3g} ms.{memory}"
    )
    return Table(f"{system.name}: decoding", rows, note)


def passes(
    system: System, base: MaskedImageModel, network: ShortcutNetwork, conditions: Conditions
) -> dict[str, Callable[[], object]]:
    """One pass of the base, and one of the shortcut, in the middle of a run."""
    decoding = system.decoding
    context = base.context(conditions, guided=decoding.is_guided)
    steps = sample(base, conditions, decoding, Accelerated(Even(1), Shortcut(network)), context)
    for _ in range(decoding.num_steps // 2):
        past = Past(next(steps).features, [])
    state = next(steps).state
    predict = Shortcut(network).start(base, context)
    inference = torch.inference_mode()
    return {
        _BASE: inference(lambda: base.features(state.tokens, context, state.clock)),
        _SHORTCUT: inference(lambda: predict(past, state)),
    }


def recording_table(system: System, base: MaskedImageModel, device: torch.device, precision: str) -> Table:
    """What recording costs beside sampling the same images."""
    decoding, count, batch_size = system.decoding.at(system.recorded_steps), system.num_recorded, system.batch_size
    with TemporaryDirectory() as folder:
        asked: InTurn = ClassLabels(count, min(32, batch_size))
        if system.prompt:
            prompts = Path(folder, "prompts.txt")
            prompts.write_text(f"{system.prompt}\n", encoding="utf-8")
            asked = Prompts(prompts, count, batch_size)
        accelerator = "gpu" if device.type == "cuda" else "cpu"
        seconds = time_recording(base, decoding, asked, Path(folder), accelerator=accelerator, precision=precision)
    plain = seconds[PLAIN]
    rows = [
        {"what": name, "images/s": count / value, "over sampling, %": 100 * (value / plain - 1)}
        for name, value in seconds.items()
    ]
    note = f"Images: {count}, of {decoding.num_steps} steps, written to the disk of temporary files."
    return Table(f"{system.name}: recording", rows, note)


def training_table(
    name: str, task: ShortcutTask, trajectories: Trajectories, device: torch.device, dtype: torch.dtype
) -> Table:
    """Pairs a second at batch 1, and at doubled batches until that is of no more use or does not fit."""
    rows: list[dict[str, Any]] = []
    batch = 1
    while batch <= _LARGEST_BATCH:
        try:
            rate = pairs_per_second(task, trajectories, batch, device, dtype)
        except torch.OutOfMemoryError:
            break
        rows.append({"batch": batch, "pairs/s": rate})
        if len(rows) > 2 and rate < 1.05 * rows[-3]["pairs/s"]:
            break
        batch *= 2
    note = "Loss, gradients, AdamW and average of weights; pairs lie on the device."
    if not rows:
        return Table(f"{name}: training", [{"batch": 1, "pairs/s": None}], f"Batch 1 does not fit in memory. {note}")
    best = max(rows, key=lambda row: float(row["pairs/s"]))
    return Table(f"{name}: training", rows, f"Best at batch {best['batch']}. {note}")


def pairs_per_second(
    task: ShortcutTask, trajectories: Trajectories, batch_size: int, device: torch.device, dtype: torch.dtype
) -> float:
    """Pairs of ``trajectories``, spread over images, branches and steps, that a training step goes through a second."""
    images, branches, num_steps = trajectories.features.shape[:3]
    places = list(product(range(images), range(branches), range(num_steps - 1)))
    spread = [places[pair * len(places) // batch_size % len(places)] for pair in range(batch_size)]
    batch = move_data_to_device(select(trajectories, spread), device)
    precision = torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
    step = partial(Trained(task, device).step, batch, precision)
    return 1000 / measure_latency({"step": step}, device, batch_size, rounds=10, warmup=3)["step"].median_ms


def _write(path: Path, machine: dict[str, str], tables: list[Table]) -> None:
    """Write ``tables`` as Markdown and JSON, each whole or not at all."""
    text = "\n".join([f"# {machine['device']}\n", *(table.markdown() for table in tables), _facts(machine)])
    numbers = json.dumps({"machine": machine, "tables": [table._asdict() for table in tables]}, indent=1)
    for suffix, content in ((".md", text), (".json", numbers)):
        with replacing(path.with_suffix(suffix)) as aside:
            aside.write_text(content + "\n")


def _facts(machine: dict[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in (machine | {"weights": "random"}).items())


if __name__ == "__main__":
    auto_cli(main)
