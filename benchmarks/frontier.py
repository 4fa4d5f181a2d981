"""``python -m benchmarks.frontier``: the frontier of every method at its best, vanilla and rivals included.

Chosen on selection seeds in two rounds: all N, budgets and plans in the base's own decoding; then, at the points that
no other of the same method beats, all other decodings. Only what is best there is measured on evaluation seeds.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from jsonargparse import auto_cli

from benchmarks import verbs
from lit_shortcut.acceleration.plans import Even
from lit_shortcut.acceleration.predictors import Hold
from lit_shortcut.evaluation.rows import VANILLA, Row, build_rows
from lit_shortcut.report.plot import front
from lit_shortcut.sampling import Decoding

Entry = list[Any]
_ROUNDS = 5  # times that each row is timed where rows are chosen


class Seeds(NamedTuple):
    """Images of each row, and the run seeds they are drawn with."""

    num_images: int
    run_seeds: list[int]


def main(
    base: str,
    methods: dict[str, dict[str, Any]],
    num_steps: list[int],
    budgets: list[int],
    plans: list[str],
    decodings: list[dict[str, Any]],
    selection: Seeds,
    evaluation: Seeds,
    only: dict[str, list[int]] | None = None,
    overlays: list[Path] | None = None,
    folder: Path = Path("runs/frontier"),
) -> None:
    """Sweep every method on selection seeds, and report its front on evaluation seeds.

    Finished rows and choices are kept, so that the same command resumes where it stopped. The working directory is the
    project's.

    Args:
        base: folder of configs; its ``evaluate.yaml`` says what is measured.
        methods: predictors by name, as ``evaluate.yaml`` has them.
        num_steps: each N, that of the base's decoding among them; vanilla runs all of them.
        budgets: base passes of the methods, where below N.
        plans: names of the plans that spread them.
        decodings: fields of the decoding that differ from the base's own, tried for all methods alike.
        selection: images that rows are chosen by.
        evaluation: images of the report; the seeds must be others.
        only: those N of ``num_steps`` that a method can run at, by its name, where it is not all of them.
        overlays: YAMLs on top of ``evaluate.yaml``, such as ``full_length.yaml``.
        folder: where ``base/sweep`` and ``base/report`` are written.

    Raises:
        ValueError: if a seed is in both sets, ``only`` names another method, or a method has no measured row.
    """
    if unknown := sorted({*(only or {})} - {*methods}):
        raise ValueError(f"only must name methods, {', '.join(methods)}; got {', '.join(unknown)}")
    if both := sorted({*selection.run_seeds} & {*evaluation.run_seeds}):
        raise ValueError(f"evaluation.run_seeds must not be among selection.run_seeds; in both: {both}")
    folder = folder / base
    entries: list[Entry] = [[steps] for steps in num_steps]
    entries += [
        [steps, budget, name, plan]
        for name in methods
        for steps in (only or {}).get(name, num_steps)
        for budget in budgets
        for plan in plans
        if budget < steps
    ]

    def measured(part: str, rows: list[Entry], seeds: Seeds, **model: Any) -> Any:
        model |= {"methods": methods, "rows": rows}
        return verbs.report(base, folder / part, overlays or [], model, seeds._asdict())

    def chosen(part: str, rows: list[Entry]) -> list[Entry]:
        """Return the best of ``rows`` and the reference, as chosen before if they were: latencies would differ."""

        def choose() -> list[Entry]:
            report = measured("sweep", rows, selection, latency_rounds=_ROUNDS)
            found, reference = best(rows, report, methods, plans), [report["num_steps"]]
            return found if reference in found else [reference, *found]

        configs = [str(path) for path in verbs.configs_of(base, overlays or [])]
        asked = {"rows": rows, "seeds": selection._asdict(), "methods": methods}
        asked["files"] = verbs.digests([methods, configs])
        found: list[Entry] = verbs.kept(folder / f"{part}.json", asked, choose)
        return found

    first = chosen("first", entries)
    entries += [[*entry, own] for entry in first for own in decodings]
    measured("report", chosen("second", entries), evaluation)


def best(
    entries: list[Entry], report: dict[str, Any], methods: dict[str, Any], plans: Iterable[str] = ()
) -> list[Entry]:
    """Return the entries that no other of the same method beats in latency and quality.

    Of plans and decodings whose steps cost the same, so that latency differs only by chance, the one of best quality
    counts.

    Raises:
        ValueError: if quality or latency was not measured, or for no row of a method.
    """
    quality = report["quality"]
    if quality is None:
        raise ValueError("a frontier needs a quality; evaluate.yaml must not set random_weights")
    rows = build_rows(entries, Decoding(), dict.fromkeys(methods, Hold()), dict.fromkeys(plans, Even))
    table = pd.DataFrame(report["rows"]).reindex(columns=["name", "method", "latency_ms", quality]).dropna()
    if missing := {row.method for row in rows} - {*table["method"]}:
        raise ValueError(f"{', '.join(sorted(missing))}: no row has both latency_ms and {quality}")
    table = table.sort_values([quality, "latency_ms"], ascending=[not report["higher_is_better"], True])
    identities = report["identities"]
    costs = {row.name: _cost(row, Decoding.from_values(identities[row.name]["decoding"])) for row in rows}
    table = table[~table["name"].map(costs).duplicated()]
    kept = {
        name
        for _, own in table.groupby("method")
        for name in front(own, quality, higher_is_better=report["higher_is_better"])
    }
    return [entry for row, entry in zip(rows, entries, strict=True) if row.name in kept]


def _cost(row: Row, decoding: Decoding) -> tuple[Any, ...]:
    """Return what determines the latency of ``row``, which was drawn in ``decoding``."""
    method = row.method if row.method == VANILLA else (row.method, row.budget)
    return method, decoding.num_steps, decoding.branches, decoding.order


if __name__ == "__main__":
    auto_cli(main)
