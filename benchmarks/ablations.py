"""``python -m benchmarks.ablations``: what each part of a shortcut is worth, in KL, images and time.

Research questions 3 and 4 of arXiv 2602.23996: control tokens, prompt tokens, time, blocks, bottleneck; and what this
project added: neighbourhood, anchoring, masked rows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import auto_cli

from benchmarks import verbs
from benchmarks.table import Table
from lit_shortcut.acceleration.predictors import Hold
from lit_shortcut.evaluation.rows import build_rows
from lit_shortcut.files import replacing
from lit_shortcut.precision import has_native_bfloat16
from lit_shortcut.sampling import Decoding
from lit_shortcut.trajectory import Card

_PLACES = {"network": "model.network", "data": "data"}
_RUN_SEEDS = [5]  # none of a report, which variants must not be chosen by


def main(
    base: str,
    variants: dict[str, dict[Literal["network", "data"], dict[str, Any]]],
    num_steps: int,
    budgets: list[int],
    max_steps: int,
    num_images: int,
    image_budgets: list[int],
    folder: Path = Path("runs/ablations"),
) -> None:
    """Train a shortcut for each variant on the recorded set of ``base``, evaluate all side by side, print one table.

    What the same arguments trained or measured already is kept. Where the device computes in bfloat16 training is in
    ``bf16-mixed`` and evaluation in ``bf16-true``. The working directory is the project's.

    Args:
        base: folder of configs; its ``extract.yaml`` must have been run.
        variants: by name, the arguments of network and datamodule that differ from ``fit.yaml``'s.
        num_steps: N of the recorded set.
        budgets: base passes that the KL is measured at.
        max_steps: optimiser steps of each variant.
        num_images: images of each row.
        image_budgets: base passes of the rows, which are drawn as the recorded set was; at the first one the cost of a
            step is timed.
        folder: where runs and ``ablations.json`` are written.
    """
    folder = folder / base
    # refuses names that rows cannot have before anything is trained
    build_rows([[num_steps, 1, name] for name in variants], Decoding(), dict.fromkeys(variants, Hold()))
    kl = {name: _fit(base, name, changes, budgets, max_steps, folder) for name, changes in variants.items()}
    decoding = json.loads((folder / next(iter(variants)) / "config.json").read_text())["decoding"]
    model = {"decoding": decoding, "methods": {name: _shortcut(folder / name) for name in variants}}
    quality, rows = _evaluate(base, model, num_steps, image_budgets, num_images, folder)
    costs = _step_costs(base, model, num_steps, image_budgets[0], folder)
    table = Table(
        f"Parts of a shortcut, {base}, N = {num_steps}",
        [
            _line(name, kl[name], quality, rows, num_steps, budgets, image_budgets) | {"a step's cost": costs[name]}
            for name in variants
        ],
        f"{max_steps:,} optimiser steps and {num_images:,} images each, one seed; KL in nats an image, along held-out "
        f"trajectories (hold: {_hold(kl, num_steps, budgets)}); a step's cost in base passes. The base itself in "
        f"{num_steps} steps: {quality} {rows[f'vanilla_n{num_steps}'][quality]:.3f}.",
    )
    print(table.markdown(), flush=True)  # noqa: T201 - what the command is for
    with replacing(folder / "ablations.json") as aside:
        aside.write_text(json.dumps(table._asdict(), indent=1))


def _fit(
    base: str,
    name: str,
    changes: dict[Literal["network", "data"], dict[str, Any]],
    budgets: list[int],
    max_steps: int,
    folder: Path,
) -> dict[str, float]:
    """Train one variant unless the same command, configuration and set have; returns the metrics of its validation."""
    export = {"path": str(folder / name), "licence": "Apache-2.0", "trained_on": f"trajectories of {base}"}
    callbacks = [
        {"class_path": "lit_shortcut.callbacks.ema.ModuleEMA", "init_args": {"decay": 0.999}},
        {"class_path": "lit_shortcut.callbacks.replay_table.ReplayTable", "init_args": {"budgets": budgets}},
        {"class_path": "lit_shortcut.callbacks.export.ExportShortcut", "init_args": export},
    ]
    words = [
        "fit",
        f"--config=configs/{base}/fit.yaml",
        f"--trainer.callbacks={json.dumps(callbacks)}",
        f"--trainer.max_steps={max_steps}",
        f"--trainer.val_check_interval={max_steps}",
        "--trainer.logger=false",
        "--trainer.enable_checkpointing=false",
        *_precision("bf16-mixed"),
        *(
            f"--{_PLACES[part]}.init_args.{key}={value if isinstance(value, str) else json.dumps(value)}"
            for part, values in changes.items()
            for key, value in values.items()
        ),
    ]

    def train() -> Any:
        verbs.run(*words)
        return yaml.safe_load((folder / "manifest.yaml").read_text())[f"{name}/model.safetensors"]["metrics"]

    config = yaml.safe_load((Path("configs") / base / "fit.yaml").read_text())
    asked = {"words": words, "config": config, "set": Card.read(config["data"]["init_args"]["source"]).digest}
    metrics: dict[str, float] = verbs.kept(folder / f"{name}.json", asked, train)
    return metrics


def _shortcut(path: Path) -> dict[str, Any]:
    loaded = {"path": str(path.resolve())}
    return {"class_path": "lit_shortcut.acceleration.shortcut.Shortcut.load", "init_args": loaded}


def _evaluate(
    base: str, model: dict[str, Any], num_steps: int, budgets: list[int], num_images: int, folder: Path
) -> tuple[str, dict[str, dict[str, Any]]]:
    """Draw images with every method of ``model``; returns the main metric and the report's lines by row name."""
    rows = [[num_steps], *([num_steps, budget, name] for name in model["methods"] for budget in budgets)]
    images = {"num_images": num_images, "run_seeds": _RUN_SEEDS}
    model = model | {"rows": rows, "latency_rounds": 0}
    found = verbs.report(base, folder / "report", [], model, images, *_precision("bf16-true"))
    return found["quality"], {line["name"]: line for line in found["rows"]}


def _step_costs(base: str, model: dict[str, Any], num_steps: int, budget: int, folder: Path) -> dict[str, float]:
    """Return what a step of every method of ``model`` takes, in base passes of the same run.

    Calls are timed one by one: latencies of whole runs vary by more than the few per cent of a pass that variants
    differ by.
    """
    rows = {name: [num_steps, budget, name] for name in model["methods"]}
    model = model | {"rows": list(rows.values())}
    found = verbs.bench(base, folder / "bench.json", model, *_precision("bf16-true"))
    parts = {name: found[_row(name, num_steps, budget)] for name in rows}
    return {name: own["shortcut"].call_ms / own["base"].call_ms for name, own in parts.items()}


def _hold(kl: dict[str, dict[str, float]], num_steps: int, budgets: list[int]) -> str:
    any_variant = next(iter(kl.values()))  # hold is the same beside all of them
    costs = [any_variant["val/kl/" + _row("hold", num_steps, budget)] for budget in budgets]
    return ", ".join(f"{cost:.1f}" for cost in costs)


def _row(method: str, num_steps: int, budget: int) -> str:
    """Return the name that the report gives a row of ``method`` with an even plan."""
    return f"{method}_n{num_steps}_b{budget}"


def _precision(wanted: str) -> list[str]:
    return [f"--trainer.precision={wanted}"] if has_native_bfloat16() else []


def _line(
    name: str,
    kl: dict[str, float],
    quality: str,
    rows: dict[str, dict[str, Any]],
    num_steps: int,
    budgets: list[int],
    image_budgets: list[int],
) -> dict[str, Any]:
    line: dict[str, Any] = {"variant": name}
    line |= {f"KL, b = {budget}": kl["val/kl/" + _row("shortcut", num_steps, budget)] for budget in budgets}
    return line | {f"{quality}, b = {budget}": rows[_row(name, num_steps, budget)][quality] for budget in image_budgets}


if __name__ == "__main__":
    auto_cli(main)
