"""Metrics of predicted features, accumulated over batches, steps and ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from lit_shortcut.metrics.functional import (
    centred_cosine,
    head_kl,
    masked_cosine,
    masked_mean,
    masked_mse,
    token_agreement,
)


class Seen(NamedTuple):
    """Features (…, S, C) and the head's logits (…, L, V); ``centre`` (…, 1, C) is the recorded features' mean."""

    features: Tensor
    logits: Tensor
    centre: Tensor


class Masked(NamedTuple):
    """Masks of the places still masked: image ``rows`` of the features, and ``tokens`` (…, L)."""

    rows: Tensor
    tokens: Tensor


class Measure(NamedTuple):
    """Function of guess and truth, a mean over masked ``places``, a field of :class:`Masked`."""

    places: Literal["rows", "tokens"]
    mean: Callable[[Seen, Seen, Tensor], Tensor]


MEASURES = {
    "mse": Measure("rows", lambda guess, truth, where: masked_mse(guess.features, truth.features, where)),
    "cosine": Measure("rows", lambda guess, truth, where: masked_cosine(guess.features, truth.features, where)),
    "cosine_centred": Measure(
        "rows", lambda guess, truth, where: centred_cosine(guess.features, truth.features, where, truth.centre)
    ),
    "head_kl": Measure("tokens", lambda guess, truth, where: masked_mean(head_kl(truth.logits, guess.logits), where)),
    "token_agreement": Measure(
        "tokens", lambda guess, truth, where: token_agreement(guess.logits, truth.logits, where)
    ),
}


class PlaceMean(Metric):
    """Mean of a measure over all masked places of all updates, accumulated in float32.

    Args:
        measure: name in ``MEASURES``.
    """

    is_differentiable = False
    full_state_update = False
    total: Tensor
    places: Tensor

    def __init__(self, measure: str) -> None:
        super().__init__()
        self.measure = measure
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("places", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, guess: Seen, truth: Seen, masked: Masked) -> None:
        """Add the measure of ``guess`` at the ``masked`` places."""
        measure = MEASURES[self.measure]
        where = getattr(masked, measure.places)
        places = where.sum()
        self.total += measure.mean(guess, truth, where) * places
        self.places += places

    def compute(self) -> Tensor:
        """Return the mean."""
        return self.total / self.places


def place_means(depth: int, suffix: str = "") -> MetricCollection:
    """Return the metrics after ``depth`` predictions in a row: all of them after one, only the error after more."""
    if depth == 1:
        return MetricCollection({name: PlaceMean(name) for name in MEASURES}, postfix=suffix, compute_groups=False)
    return MetricCollection({"mse": PlaceMean("mse")}, prefix="rollout_", postfix=f"_{depth}{suffix}")


@torch.no_grad()
def diagnostics(prediction: Tensor, held: Tensor, target: Tensor, where: Tensor) -> dict[str, Tensor]:
    """Errors and cosines of ``prediction`` and of ``held`` features (B, S, C) against ``target`` ``where`` true."""
    guesses = {"": prediction, "_hold": held}
    return {f"mse{suffix}": masked_mse(guess, target, where) for suffix, guess in guesses.items()} | {
        f"cosine{suffix}": masked_cosine(guess, target, where) for suffix, guess in guesses.items()
    }
