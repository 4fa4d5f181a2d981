"""The report's text, and the whole report as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import pandas as pd

from lit_shortcut.invocation import command
from lit_shortcut.report.provenance import commit, versions
from lit_shortcut.report.table import dominated, within_best

FEW_IMAGES = 5_000  # below this, a Fréchet distance depends visibly on their number

_RANDOM = "Random weights: latency only. No images were drawn, so this says nothing about quality."


def notes(
    table: pd.DataFrame,
    quality: str | None,
    latency: Mapping[str, Any] | None,
    *,
    higher_is_better: bool,
    num_steps: int,
    dtype: str,
    incomplete: Sequence[str] = (),
    shortcuts: Collection[str] = (),
    step_share: float | None = None,
) -> str:
    """Return the text below the table, in Markdown: how rows were measured, and which dominate others.

    Args:
        table: made by :func:`~lit_shortcut.report.table.collect`.
        quality: the metric that rows are compared by; None if no images were drawn.
        latency: the stored latency of one row; None if latency was not measured.
        higher_is_better: whether a higher ``quality`` is better.
        num_steps: N of the vanilla that speed-ups refer to.
        dtype: what the rows were computed in.
        incomplete: names of the rows whose latency is missing.
        shortcuts: names of the rows with a shortcut.
        step_share: share of a base pass that a shortcut step takes on another base, to compute what the rows would cost
            there; None leaves that out.
    """
    lines = []
    if "images" in table:
        images, seeds = (sorted(set(table[name].dropna().astype(int))) for name in ("images", "seeds"))
        lines += [
            f"{_several(images)} images per row and seed, {_several(seeds)} seed(s); ± is a 95 % interval of the mean "
            "over seeds (Student's t). b is the counted number of base passes per image: the mean, and 5–95 % where it "
            "varies."
        ]
        if max(images, default=0) < FEW_IMAGES:
            lines += [
                f"Fewer than {FEW_IMAGES:,} images: distances are biased upwards; compare these rows with one another."
            ]
    else:
        lines += [_RANDOM]
    if latency is not None:
        lines += [
            f"Latency: decoding loop only, median (interquartile range) of {latency['rounds']} rounds in turns, batch "
            f"{latency['batch_size']}, {dtype}, {latency['device']}; its cost is also given in passes of "
            f"the base, timed beside it. Speed-ups refer to vanilla at N = {num_steps}."
        ]
        if incomplete:
            lines += [
                f"No latency was measured for {', '.join(incomplete)} under these settings; latency_rounds does so."
            ]
        if step_share is not None and (costs := _costs(table, shortcuts, step_share)):
            lines += [
                f"Computed, not measured: where a shortcut step takes {step_share:.1%} of a base pass, b + (N − b) · "
                f"{step_share:g} passes are {costs}."
            ]
        if quality is not None:
            lines += _compared(table, quality, higher_is_better=higher_is_better)
    return "\n".join(lines)


def _compared(table: pd.DataFrame, quality: str, *, higher_is_better: bool) -> list[str]:
    """Return which rows dominate which, and how fast each method is within the interval of the best vanilla row.

    Neither with one seed of few images, where rows of equal quality differ by more than methods do.
    """
    if table["seeds"].max() == 1 and table["images"].max() < FEW_IMAGES:
        return ["- With one seed of so few images rows differ by chance: more of both, or several run_seeds, decide."]
    losers: dict[str, list[str]] = {}
    for winner, loser in dominated(table, quality, higher_is_better=higher_is_better):
        losers.setdefault(winner, []).append(loser)
    better = "higher" if higher_is_better else "lower"
    beyond = ", beyond the intervals," if losers and table["seeds"].max() > 1 else ""
    said = [
        f"- {winner} dominates {', '.join(beaten)}: {better} {quality}{beyond} at no more latency"
        for winner, beaten in losers.items()
    ]
    best, *near = within_best(table, quality, higher_is_better=higher_is_better).to_dict("records") or [{}]
    if best:
        found = [f"{row['name']}, {row['speedup'] / best['speedup']:.2f} times as fast" for row in near]
        without = sorted({*table["method"]} - {best["method"]} - {row["method"] for row in near})
        none = [f"none of {', '.join(without)}"] if without else []
        said.append(
            f"- the fastest within the interval of the best vanilla row, {best['name']} with {quality} "
            f"{best[quality]:.3f} ± {best[f'{quality}_interval']:.3f}: {'; '.join(found + none)}"
        )
    return [""] * bool(said) + said


def json_of(table: pd.DataFrame, **provenance: Any) -> str:
    """Return all figures of ``table`` as JSON, with ``provenance``, versions of packages, commit and command."""
    rows = [{name: value for name, value in line.items() if not _is_nan(value)} for line in table.to_dict("records")]
    code = {"versions": versions(), "commit": commit(), "command": command()}
    return json.dumps({"rows": rows} | code | provenance, indent=1) + "\n"


def _costs(table: pd.DataFrame, shortcuts: Collection[str], step_share: float) -> str:
    """Return the cost of each row with a shortcut, in base passes."""
    rows = table[table["name"].isin(shortcuts)]
    passes = rows["b"].fillna(rows["budget"]) if "b" in rows else rows["budget"]
    costs = passes + (rows["N"] - passes) * step_share
    return ", ".join(f"{cost:.2f} for {name}" for name, cost in zip(rows["name"], costs, strict=True))


def _several(numbers: Sequence[int]) -> str:
    return " or ".join(f"{number:,}" for number in numbers)


def _is_nan(value: object) -> bool:
    return isinstance(value, float) and math.isnan(value)
