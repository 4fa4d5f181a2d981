"""Generation of a row's images, and checks of all rows before anything is generated."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torchvision
from torch import Tensor

from lit_shortcut.contracts import ChecksConditions, Conditions, ConditionSource, Context, MaskedImageModel
from lit_shortcut.decoding.halton import halton_order
from lit_shortcut.decoding.schedules import tokens_per_step
from lit_shortcut.evaluation.rows import Row, naming
from lit_shortcut.sampling import generate


class Drawn(NamedTuple):
    """Images, uint8 (B, 3, H, W), the number of base passes for each (B,), and their codes (B, L)."""

    images: Tensor
    full_steps: Tensor
    tokens: Tensor


def draw_row(base: MaskedImageModel, conditions: Conditions, row: Row) -> Drawn:
    """Generate the images of ``row`` for ``conditions``."""
    tokens, full_steps = generate(base, conditions, row.decoding, row.acceleration)
    return Drawn(base.decode(tokens), full_steps, tokens)


def require_known(base: MaskedImageModel, conditions: ConditionSource, *, guided: bool) -> Context | None:
    """Check that ``base`` knows all of ``conditions``; return the first batch's context, None if there are no batches.

    All other contexts are computed and dropped, unless the base can check conditions without.

    Raises:
        ValueError: if the base does not know a condition.
    """
    first = None
    for batch in conditions.loader():
        if first is None:
            first = base.context(batch, guided=guided)
        elif isinstance(base, ChecksConditions):
            base.require_known(batch)
        else:
            base.context(batch, guided=guided)
    return first


def require_feasible(base: MaskedImageModel, rows: Iterable[Row], conditions: ConditionSource) -> None:
    """Check every row up front instead of failing half-way through a run.

    Raises:
        ValueError: naming the row, if the base does not know a condition, this rank has none, the schedule cannot spend
            the tokens in the row's steps, the plan does not fit them, the tokens of a Halton order form no grid, or a
            shortcut was trained for another base.
    """
    contexts: dict[bool, Context | None] = {}
    for row in rows:
        guided = row.decoding.is_guided
        if guided not in contexts:
            contexts[guided] = require_known(base, conditions, guided=guided)
        context = contexts[guided]
        if context is None:
            raise ValueError("conditions hold fewer batches than there are ranks; use smaller batches")
        with naming(row.name):
            counts = tokens_per_step(row.decoding.schedule, row.decoding.num_steps, base.spec.num_tokens)
            if row.decoding.order != "confidence":
                halton_order(*base.spec.grid)
            row.acceleration.start(base, context, counts)


def strip_of(images: Tensor) -> Tensor:
    """Join ``images``, uint8 (B, 3, H, W), side by side into one (3, H', W')."""
    strip: Tensor = torchvision.utils.make_grid(images.cpu(), nrow=len(images), padding=1, pad_value=255)
    return strip
