"""Drawing the images of a row, and refusing before anything is drawn what cannot be."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torchvision
from torch import Tensor

from lit_shortcut.contracts import Conditions, ConditionSource, Context, MaskedImageModel
from lit_shortcut.decoding.halton import halton_order
from lit_shortcut.decoding.schedules import tokens_per_step
from lit_shortcut.evaluation.rows import Row
from lit_shortcut.sampling import generate


class Drawn(NamedTuple):
    """Images, uint8 (B, 3, H, W), and how often the base ran for each (B,)."""

    images: Tensor
    full_steps: Tensor


def draw(base: MaskedImageModel, conditions: Conditions, row: Row) -> Drawn:
    """Draw and decode the images of ``row`` for ``conditions``."""
    tokens, full_steps = generate(base, conditions, row.decoding, row.acceleration)
    return Drawn(base.decode(tokens), full_steps)


def require_known(base: MaskedImageModel, conditions: ConditionSource, *, guided: bool) -> Context | None:
    """Return the context of the first batch of ``conditions``, after a look at all; None if there is none.

    Raises:
        ValueError: if the base does not know a condition.
    """
    first = None
    for batch in conditions.loader():
        context = base.context(batch, guided=guided)
        first = context if first is None else first  # contexts of all prompts may take gigabytes
    return first


def require_feasible(base: MaskedImageModel, rows: Iterable[Row], conditions: ConditionSource) -> None:
    """Refuse before anything is run what would fail only when its turn comes.

    Raises:
        ValueError: if the base does not know a condition, this rank has none, the schedule cannot spend the tokens in a
            row's steps, a plan does not fit them, a Halton order has no grid to lie on, or a shortcut was trained for
            another base; the message names the row.
    """
    contexts: dict[bool, Context | None] = {}
    for row in rows:
        guided = row.decoding.is_guided
        if guided not in contexts:
            contexts[guided] = require_known(base, conditions, guided=guided)
        context = contexts[guided]
        if context is None:
            raise ValueError("conditions hold fewer batches than there are ranks: take smaller batches")
        try:
            counts = tokens_per_step(row.decoding.schedule, row.decoding.num_steps, base.spec.num_tokens)
            if row.decoding.order != "confidence":
                halton_order(*base.spec.grid)
            row.acceleration.start(base, context, counts)
        except ValueError as error:
            error.args = (f"{row.name}: {error}",)
            raise


def strip_of(images: Tensor) -> Tensor:
    """Return ``images``, uint8 (B, 3, H, W), side by side in one of (3, H', W')."""
    strip: Tensor = torchvision.utils.make_grid(images.cpu(), nrow=len(images), padding=1, pad_value=255)
    return strip
