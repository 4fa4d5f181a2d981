"""A benchmark's answer."""

from __future__ import annotations

from typing import Any, NamedTuple

import pandas as pd


class Table(NamedTuple):
    """``rows`` under a ``title``, and a ``note`` on how they were measured."""

    title: str
    rows: list[dict[str, Any]]
    note: str

    def markdown(self) -> str:
        """As it is printed, with four significant digits."""
        rounded = pd.DataFrame(self.rows).map(_rounded)
        return f"### {self.title}\n\n{rounded.to_markdown(index=False, floatfmt='g')}\n\n{self.note}\n"


def _rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value
