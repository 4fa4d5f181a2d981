"""Measures of predicted features that add up over batches, steps and ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

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


Measure = Callable[[Seen, Seen, Tensor], Tensor]
"""From guess, truth and masked places (…, L) to the mean over these places, a scalar."""

MEASURES: dict[str, Measure] = {
    "mse": lambda guess, truth, masked: masked_mse(guess.features, truth.features, masked),
    "cosine": lambda guess, truth, masked: masked_cosine(guess.features, truth.features, masked),
    "cosine_centred": lambda guess, truth, masked: centred_cosine(guess.features, truth.features, masked, truth.centre),
    "head_kl": lambda guess, truth, masked: masked_mean(head_kl(truth.logits, guess.logits), masked),
    "token_agreement": lambda guess, truth, masked: token_agreement(guess.logits, truth.logits, masked),
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

    def update(self, guess: Seen, truth: Seen, is_masked: Tensor) -> None:
        """Add the measure of ``guess`` at the places ``is_masked`` (…, L)."""
        places = is_masked.sum()
        self.total += MEASURES[self.measure](guess, truth, is_masked) * places
        self.places += places

    def compute(self) -> Tensor:
        """The mean so far."""
        return self.total / self.places


def place_means(depth: int, suffix: str = "") -> MetricCollection:
    """Return what is measured after ``depth`` predictions in a row: everything after one, the error after more."""
    if depth == 1:
        return MetricCollection({name: PlaceMean(name) for name in MEASURES}, postfix=suffix, compute_groups=False)
    return MetricCollection({"mse": PlaceMean("mse")}, prefix="rollout_", postfix=f"_{depth}{suffix}")
