"""The lines that close a report: the best shortcut against vanilla, where to look, what to run next."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import pandas as pd

from lit_shortcut.evaluation.rows import VANILLA


def closing(
    table: pd.DataFrame,
    *,
    shortcuts: Collection[str],
    reference: str,
    quality: str | None,
    higher_is_better: bool,
    page: Path | None = None,
    command: str = "",
) -> str:
    """Return up to three lines: best shortcut row, page, next command; anything unknown has no line.

    Args:
        table: made by :func:`~lit_shortcut.report.table.collect`.
        shortcuts: names of the rows with a shortcut.
        reference: name of the vanilla row that speed-ups refer to.
        quality: the metric that decides which row is best; None if no images were drawn.
        higher_is_better: whether a higher ``quality`` is better.
        page: file of the report's page.
        command: what to run next.
    """
    best = _best_shortcut(table, shortcuts, reference, quality, higher_is_better=higher_is_better) if quality else ""
    lines = {"best shortcut": best, "page": "" if page is None else str(page), "next": command}
    return "\n".join(f"{name}: {text}" for name, text in lines.items() if text)


def _best_shortcut(
    table: pd.DataFrame, shortcuts: Collection[str], reference: str, quality: str, *, higher_is_better: bool
) -> str:
    """Compare the best shortcut that is faster than the reference with it, and with vanilla at a similar latency.

    If no shortcut is faster, the best of all is taken. The text is empty if nothing comparable was measured.
    """
    needed = ["latency_ms", "speedup", quality]
    if not {*needed} <= {*table.columns}:
        return ""
    measured = table.dropna(subset=needed).set_index("name").sort_values(quality, ascending=not higher_is_better)
    found = measured[measured.index.isin(shortcuts)]
    if found.empty or reference not in measured.index:
        return ""
    faster = found[found["speedup"] > 1]
    best = (found if faster.empty else faster).iloc[0]
    vanilla = measured[measured["method"] == VANILLA]
    nearest = vanilla.loc[(vanilla["latency_ms"] - best["latency_ms"]).abs().idxmin()]
    text = (
        f"{best.name} has {quality} {best[quality]:.3f} at {best['latency_ms']:.1f} ms/image, "
        f"{best['speedup']:.2f}× as fast as {reference} ({vanilla.loc[reference, quality]:.3f})"
    )
    if nearest.name == reference:
        return text
    return f"{text}; nearest in latency, {nearest.name} has {nearest[quality]:.3f} at {nearest['latency_ms']:.1f}"
