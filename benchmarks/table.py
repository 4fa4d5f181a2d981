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
        """As it is printed."""
        shown = pd.DataFrame(self.rows).to_markdown(index=False, floatfmt=".4g")
        return f"### {self.title}\n\n{shown}\n\n{self.note}\n"
