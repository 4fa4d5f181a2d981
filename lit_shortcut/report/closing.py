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
    """Return three lines, or fewer: best shortcut row, page, next command; what is unknown has no line.

    Args:
        table: made by :func:`~lit_shortcut.report.table.collect`.
        shortcuts: names of the rows with a shortcut.
        reference: name of the vanilla row that speed-ups refer to.
        quality: the metric that decides which row is best; None where no images were drawn.
        higher_is_better: of ``quality``.
        page: file of the report's page.
        command: what to run next.
    """
    best = _best_shortcut(table, shortcuts, reference, quality, higher_is_better=higher_is_better) if quality else ""
    lines = {"best shortcut": best, "page": "" if page is None else str(page), "next": command}
    return "\n".join(f"{name}: {text}" for name, text in lines.items() if text)


def _best_shortcut(
    table: pd.DataFrame, shortcuts: Collection[str], reference: str, quality: str, *, higher_is_better: bool
) -> str:
    """Compare the shortcut of best quality among those faster than the reference with it, and at equal latency.

    Where no shortcut is faster, it is the best of all. Empty where nothing was measured to compare.
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
