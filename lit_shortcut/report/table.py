"""Finished rows as a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from lit_shortcut.evaluation.results import Results
from lit_shortcut.evaluation.rows import EVEN, VANILLA, Row
from lit_shortcut.metrics.functional import mean_interval
from lit_shortcut.metrics.latency import ratio

_ABSENT = "–"


def collect(
    results: Results, rows: Sequence[Row], seeds: Sequence[int], loops: Mapping[str, Any], reference: str
) -> pd.DataFrame:
    """Return one line for each of ``rows``, in that order, with means and 95 % intervals over run ``seeds``.

    Columns: ``name``, ``method``, ``N``, ``budget`` as asked for, ``plan``, ``decoding`` (the row's own settings), and
    if there is any value: ``images``, ``seeds``; base passes ``b``, ``b_low`` and ``b_high`` (mean, 5 % and 95 % of the
    images); ``latency_ms``, ``latency_iqr_ms``, ``passes``, ``speedup``, ``memory_mb``; for each metric its
    mean under its name and half an interval under ``<name>_interval`` (NaN with one seed). Anything not measured for a
    row is NaN.

    Args:
        results: stored results of an evaluation.
        rows: ways to decode.
        seeds: run seeds to average over.
        loops: what each row's latency depends on now, by row name; latencies measured under anything else are left
            out.
        reference: name of the row that speed-ups refer to.
    """
    latencies = current_latencies(results, loops)
    return pd.DataFrame([_line(results, row, seeds, latencies, reference) for row in rows])


def current_latencies(results: Results, loops: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the stored latencies, by row name, that were measured under ``loops``."""
    stored = results.latency()
    before = stored["identity"]["rows"]
    return {name: found for name, found in stored["measured"].items() if before.get(name) == loops.get(name)}


def _line(
    results: Results, row: Row, seeds: Sequence[int], latencies: Mapping[str, dict[str, Any]], reference: str
) -> dict[str, Any]:
    line = row.entry()
    found = [stored for seed in seeds if (stored := results.stored(row, seed)) is not None]
    if found:
        line |= {"images": found[0]["identity"]["conditions"]["num_images"], "seeds": len(found)}
        passes = [stored["full_steps"] for stored in found]
        line |= {"b": sum(each["mean"] for each in passes) / len(passes)}
        line |= {"b_low": min(each["low"] for each in passes), "b_high": max(each["high"] for each in passes)}
    if row.name in latencies:
        own = latencies[row.name]
        line |= {"latency_ms": own["median_ms"], "latency_iqr_ms": own["iqr_ms"], "passes": own["passes"]}
        if reference in latencies:
            line["speedup"] = ratio(latencies[reference]["round_ms"], own["round_ms"])
        if "memory_mb" in own:
            line["memory_mb"] = own["memory_mb"]
    for metric in found[0]["values"] if found else ():
        line[metric], line[f"{metric}_interval"] = mean_interval([stored["values"][metric] for stored in found])
    return line


def metric_names(table: pd.DataFrame) -> list[str]:
    """Return the metrics of a table made by :func:`collect`, in order."""
    return [name for name in table.columns if f"{name}_interval" in table.columns]


def shown_passes(line: Mapping[str, Any]) -> str:
    """Return the base passes of a line as measured: the mean, with 5–95 % where they vary; else as asked for.

    >>> shown_passes({"budget": 4, "b": 4.25, "b_low": 3, "b_high": 6}), shown_passes({"budget": 4})
    ('4.25 (3–6)', '4')
    """
    mean = line.get("b", math.nan)
    if math.isnan(mean):
        return f"{line['budget']}"
    low, high = line["b_low"], line["b_high"]
    return f"{mean:.4g}" if low == high else f"{mean:.4g} ({low:.0f}–{high:.0f})"


def for_people(table: pd.DataFrame) -> pd.DataFrame:
    """Return ``table`` as text: units in the header, intervals after ±, and a dash where nothing was measured."""
    shown = table[["method", "N"]].copy()
    shown["b"] = [shown_passes(line) for line in table.to_dict("records")]
    if set(table["plan"]) - {"", EVEN}:
        shown["plan"] = table["plan"]
    if table["decoding"].any():
        shown["decoding"] = table["decoding"]
    if "latency_ms" in table:
        shown["latency ms/image"] = _cells(table, "{:.1f} ({:.1f})", "latency_ms", "latency_iqr_ms")
        shown["cost in passes"] = _cells(table, "{:.2f}", "passes")
    if "speedup" in table:
        shown["speed-up"] = _cells(table, "{:.2f}×", "speedup")
    if "memory_mb" in table:
        shown["memory MB"] = _cells(table, "{:.0f}", "memory_mb")
    for name in metric_names(table):
        form = f"{{:.{_decimals(table[name])}f}}"
        several = _cells(table, f"{form} ± {form}", name, f"{name}_interval")
        one = _cells(table, form, name)
        shown[name] = [both if both != _ABSENT else mean for both, mean in zip(several, one, strict=True)]
    return shown.astype(str)


def markdown(table: pd.DataFrame) -> str:
    """Return :func:`for_people` in Markdown."""
    text: str = for_people(table).to_markdown(index=False, disable_numparse=True)
    return text


def _decimals(values: pd.Series) -> int:
    """Return how many decimals show three digits of the largest of ``values``, at least 3.

    >>> _decimals(pd.Series([0.52, 12.3])), _decimals(pd.Series([0.00031, -0.00002])), _decimals(pd.Series([0.0]))
    (3, 6, 3)
    """
    largest = values.abs().max()
    return max(3, 2 - math.floor(math.log10(largest))) if largest > 0 else 3


def _cells(table: pd.DataFrame, form: str, *columns: str) -> list[str]:
    rows = zip(*(table[column] for column in columns), strict=True)
    return [_ABSENT if any(pd.isna(value) for value in values) else form.format(*values) for values in rows]


def dominated(table: pd.DataFrame, metric: str, *, higher_is_better: bool) -> list[tuple[str, str]]:
    """Return pairs (winner, loser) of names of rows of different methods: better ``metric`` at no more latency.

    Better is what chance does not explain: means over seeds must differ by more than the 95 % interval of their
    difference, the root of the sum of both intervals' squares. With one seed there are none, and any difference counts.
    """
    sign = -1 if higher_is_better else 1
    pairs = []
    for _, winner in table.iterrows():
        for _, loser in table.iterrows():
            halves = (line[f"{metric}_interval"] for line in (winner, loser))
            interval = math.hypot(*(0.0 if math.isnan(half) else half for half in halves))
            is_better = sign * (loser[metric] - winner[metric]) > interval
            differs = winner["method"] != loser["method"]
            if differs and is_better and winner["latency_ms"] <= loser["latency_ms"]:
                pairs.append((winner["name"], loser["name"]))
    return pairs


def within_best(table: pd.DataFrame, metric: str, *, higher_is_better: bool) -> pd.DataFrame:
    """Return the best vanilla row, then the fastest row of each method whose ``metric`` lies within its interval.

    Empty where there is one seed only, or no vanilla with a speed-up.
    """
    if not {metric, "speedup"} <= set(table.columns):
        return table[:0]
    measured = table.dropna(subset=[metric, f"{metric}_interval", "speedup"])
    vanilla = measured[measured["method"] == VANILLA].sort_values(metric, ascending=not higher_is_better)
    best, sign = vanilla[:1], -1 if higher_is_better else 1
    allowed = (sign * best[metric] + best[f"{metric}_interval"]).max()
    near = measured[sign * measured[metric] <= allowed].sort_values("speedup", ascending=False)
    return pd.concat([best, near.drop_duplicates("method").drop(best.index, errors="ignore")])
