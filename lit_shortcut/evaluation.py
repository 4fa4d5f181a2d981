"""What is measured of generated images: one row is a way to decode them, at one run seed."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torchvision
from torch import Tensor

from lit_shortcut.acceleration.accelerated import Vanilla
from lit_shortcut.contracts import Acceleration, Conditions, ConditionSource, Context, MaskedImageModel
from lit_shortcut.decoding.halton import halton_order
from lit_shortcut.decoding.schedules import tokens_per_step
from lit_shortcut.metrics.images import ImageMetric
from lit_shortcut.sampling import Decoding, Order, generate


@dataclass(frozen=True)
class Row:
    """One way to decode.

    Args:
        num_steps: N.
        acceleration: what computes the features of each step; None is vanilla.
        order: which places are committed first; None is the task's own order, and named by no row.
    """

    num_steps: int
    acceleration: Acceleration | None = None
    order: Order | None = None

    @property
    def method(self) -> Acceleration:
        """The acceleration, vanilla where none is given."""
        return self.acceleration or Vanilla()

    def decoding(self, default: Decoding) -> Decoding:
        """``default`` in the row's own steps and order."""
        return replace(default, num_steps=self.num_steps, order=self.order or default.order)

    def facts(self) -> dict[str, Any]:
        """``method``, ``num_steps``, ``budget`` (N itself for vanilla); weights and an order of its own, if any."""
        facts = {"num_steps": self.num_steps, "budget": self.num_steps} | self.method.identity()
        facts |= {"order": self.order} if self.order else {}
        if int(facts["budget"]) > self.num_steps:
            raise ValueError(f"budget must lie in 1..{self.num_steps}, the number of steps; got {facts['budget']}")
        return facts

    @property
    def name(self) -> str:
        """As in tables and file names: ``vanilla_n8``, ``shortcut_n16_b4``, ``vanilla_n16_halton``."""
        facts = self.facts()
        budget = f"_b{facts['budget']}" if "budget" in self.method.identity() else ""
        order = f"_{self.order}" if self.order else ""
        return f"{facts['method'].replace(' ', '')}_n{self.num_steps}{budget}{order}"


def images_of(base: MaskedImageModel, conditions: Conditions, decoding: Decoding, row: Row) -> Tensor:
    """Images, uint8 (B, 3, H, W), that ``row`` draws for ``conditions``."""
    return base.decode(generate(base, conditions, row.decoding(decoding), row.method).tokens)


def require_known(base: MaskedImageModel, decoding: Decoding, conditions: ConditionSource) -> Context | None:
    """The context of the first batch of ``conditions``, after a look at all; None if there is none.

    Raises:
        ValueError: if the base does not know a condition.
    """
    first = None
    for batch in conditions.loader():
        context = base.context(batch, guided=decoding.is_guided)
        first = context if first is None else first  # contexts of all prompts may take gigabytes
    return first


def require_feasible(
    base: MaskedImageModel, decoding: Decoding, rows: Iterable[Row], conditions: ConditionSource
) -> None:
    """Refuse before anything is run what would fail only when its turn comes.

    Raises:
        ValueError: if the base does not know a condition, this rank has none, the schedule cannot spend the tokens in a
            row's steps, a budget lies outside 1..N, a Halton order has no grid to lie on, or a shortcut was trained for
            another base.
    """
    context = require_known(base, decoding, conditions)
    if context is None:
        raise ValueError("conditions hold fewer batches than there are ranks: take smaller batches")
    for row in rows:
        counts = tokens_per_step(decoding.schedule, row.num_steps, base.spec.num_tokens)
        if row.decoding(decoding).order != "confidence":
            halton_order(*base.spec.grid)
        row.method.start(base, context, counts)


def strip_of(images: Tensor) -> Tensor:
    """``images``, uint8 (B, 3, H, W), side by side in one of (3, H', W')."""
    strip: Tensor = torchvision.utils.make_grid(images.cpu(), nrow=len(images), padding=1, pad_value=255)
    return strip


def add_images(metrics: Iterable[ImageMetric], images: Tensor, conditions: Conditions) -> None:
    """Feed each of ``metrics`` with ``images`` and what was asked for."""
    for metric in metrics:
        metric.update(images, conditions)


def take_values(metrics: dict[str, ImageMetric]) -> dict[str, float]:
    """Value of each metric, over all ranks; the metrics start anew."""
    values = {}
    for name, metric in metrics.items():
        values[name] = float(metric.compute())
        metric.reset()
    return values


class Results:
    """Finished rows as JSON files in a folder, so that a run that was stopped goes on where it was.

    A row counts as finished only under the same facts (base, decoding, weights, number of images): a change of any of
    them measures it anew.

    Args:
        folder: holds ``rows/``, ``images/`` and ``latency.json``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(self, row: Row, seed: int, facts: dict[str, Any]) -> dict[str, float] | None:
        """Values of a row measured before under equal ``facts``, else None."""
        stored = self._read(self._row_path(row, seed))
        return stored["values"] if stored is not None and stored["facts"] == facts else None

    def add(self, row: Row, seed: int, facts: dict[str, Any], values: dict[str, float]) -> None:
        """Store a finished row."""
        self._write(self._row_path(row, seed), {"facts": facts, "values": values})

    def add_images(self, row: Row, images: Tensor, prompts: tuple[str, ...] = ()) -> None:
        """Store ``images``, uint8 (B, 3, H, W), as a strip for the grids, and the ``prompts`` they were made for."""
        path = self.images_path(row)
        path.parent.mkdir(parents=True, exist_ok=True)
        torchvision.io.write_png(strip_of(images), str(path))
        if prompts:
            self._write(path.with_name("prompts.json"), list(prompts))

    def images_path(self, row: Row) -> Path:
        """Where a row's strip of images is."""
        return self.folder / "images" / f"{row.name}.png"

    def latency(self) -> dict[str, Any] | None:
        """What :meth:`set_latency` stored, or None."""
        return self._read(self.folder / "latency.json")

    def set_latency(self, facts: dict[str, Any], measured: dict[str, dict[str, Any]]) -> None:
        """Store latencies by row name, all measured in one run."""
        self._write(self.folder / "latency.json", {"facts": facts, "measured": measured})

    def _row_path(self, row: Row, seed: int) -> Path:
        return self.folder / "rows" / f"{row.name}_seed{seed}.json"

    @staticmethod
    def _read(path: Path) -> dict[str, Any] | None:
        try:
            stored: dict[str, Any] = json.loads(path.read_text())
        except FileNotFoundError:
            return None
        except ValueError as error:  # no JSON, or no text at all
            raise ValueError(f"{path}: not a result file ({error}); delete it and its row is measured anew") from error
        return stored

    @staticmethod
    def _write(path: Path, content: dict[str, Any] | list[str]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(".tmp")
        aside.write_text(json.dumps(content, indent=1) + "\n")
        aside.replace(path)


def row_facts(base: MaskedImageModel, decoding: Decoding, row: Row, num_images: int) -> dict[str, Any]:
    """All that a row's values depend on besides the run seed."""
    return {
        "base": base.fingerprint,
        "decoding": asdict(row.decoding(decoding)),
        "row": row.facts(),
        "num_images": num_images,
    }
