"""``python -m benchmarks.frontier``: the frontier of every method at its best, vanilla and rivals included.

Chosen on selection seeds in two rounds: all N and budgets in the base's own decoding; then, at the points that no other
of the same method beats, all other decodings. Only what is best there is measured on evaluation seeds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import yaml
from jsonargparse import auto_cli

from benchmarks.verbs import run
from lit_shortcut.acceleration.predictors import Hold
from lit_shortcut.evaluation.rows import build_rows
from lit_shortcut.report.plot import front
from lit_shortcut.sampling import Decoding

Entry = list[Any]


class Seeds(NamedTuple):
    """Images of each row, and the run seeds they are drawn with."""

    num_images: int
    run_seeds: list[int]


def main(
    base: str,
    methods: dict[str, dict[str, Any]],
    num_steps: list[int],
    budgets: list[int],
    decodings: list[dict[str, Any]],
    selection: Seeds,
    evaluation: Seeds,
    reference: int,
    trainer: dict[str, Any] | None = None,
    folder: Path = Path("runs/frontier"),
) -> None:
    """Sweep every method on selection seeds, and report its front on evaluation seeds; finished rows are kept.

    Args:
        base: folder of configs; its ``evaluate.yaml`` says what is measured.
        methods: predictors by name, as ``evaluate.yaml`` has them.
        num_steps: each N; vanilla runs all of them.
        budgets: base passes of the methods, where below N.
        decodings: fields of the decoding that differ from the base's own, tried for all methods alike.
        selection: images that rows are chosen by.
        evaluation: images of the report; the seeds must be others.
        reference: N of the vanilla row that speed-ups refer to.
        trainer: arguments of the trainer, such as plugins.
        folder: where ``base/sweep`` and ``base/report`` are written.

    Raises:
        ValueError: if a seed is in both sets, or ``reference`` is no N.
    """
    if both := sorted({*selection.run_seeds} & {*evaluation.run_seeds}):
        raise ValueError(f"evaluation.run_seeds must not be among selection.run_seeds; in both: {both}")
    if reference not in num_steps:
        raise ValueError(f"reference must be one of num_steps {num_steps}, got {reference}")
    folder = (folder / base).resolve()
    entries: list[Entry] = [[steps] for steps in num_steps]
    entries += [
        [steps, budget, name] for name in methods for steps in num_steps for budget in budgets if budget < steps
    ]

    def measure(part: str, entries: list[Entry], seeds: Seeds) -> dict[str, Any]:
        model = {"methods": methods, "rows": entries, "results": str(folder / part)}
        overlay = folder / f"{part}.yaml"
        overlay.parent.mkdir(parents=True, exist_ok=True)
        content = {"model": {"init_args": model}, "data": {"init_args": seeds._asdict()}, "trainer": trainer or {}}
        overlay.write_text(yaml.safe_dump(content))
        run("test", f"--config=configs/{base}/evaluate.yaml", f"--config={overlay}", "--trainer.logger=false")
        found: dict[str, Any] = json.loads((folder / part / "report.json").read_text())
        return found

    first = best(entries, measure("sweep", entries, selection), methods)
    entries += [[*entry, own] for entry in first for own in decodings]
    chosen = best(entries, measure("sweep", entries, selection), methods)
    measure("report", [[reference], *(entry for entry in chosen if entry != [reference])], evaluation)


def best(entries: list[Entry], report: dict[str, Any], methods: dict[str, Any]) -> list[Entry]:
    """Return the entries that no other of the same method beats in latency and quality.

    Of decodings that differ in neither N nor budget, and so only by chance in latency, the one of best quality counts.
    """
    rows = build_rows(entries, Decoding(), dict.fromkeys(methods, Hold()))
    table, quality = pd.DataFrame(report["rows"]).set_index("name", drop=False), report["quality"]
    table = table.sort_values(quality, ascending=not report["higher_is_better"])
    same = {row.name: (row.method, row.decoding.num_steps, row.budget) for row in rows}
    table = table[~table["name"].map(same).duplicated()]
    kept = {
        name
        for _, own in table.groupby("method")
        for name in front(own, quality, higher_is_better=report["higher_is_better"])
    }
    return [entry for row, entry in zip(rows, entries, strict=True) if row.name in kept]


if __name__ == "__main__":
    auto_cli(main)
