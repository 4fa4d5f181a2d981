"""Low-discrepancy order of the places of a token grid (Besnier et al., Halton scheduler, ICLR 2025)."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from lit_shortcut.decoding.noise import uniform

_ROLL_STREAM = -1  # streams 0, 1, … belong to the steps of the decoding loop


@cache
def halton_order(height: int, width: int) -> Tensor:
    """Return the places (L,) of a ``height`` × ``width`` grid, numbered row by row, in the order of Halton points.

    Point n = 1, 2, … takes its row from the radical inverse of n in base 2 and its column from that in base 3; repeated
    places are skipped. So at any time both the committed places and the masked ones are spread evenly over the grid.

    >>> halton_order(2, 3).tolist()
    [4, 2, 3, 1, 5, 0]
    """
    num_places = height * width
    num_points = 4 * num_places  # doubled until every place is visited
    while True:
        index = torch.arange(1, num_points + 1)
        places = _cell(index, 2, height) * width + _cell(index, 3, width)
        met_at = torch.full((num_places,), num_points).scatter_reduce(0, places, index - 1, "amin")
        if int(met_at.max()) < num_points:
            return met_at.argsort()
        num_points *= 2


def rolled_starts(seeds: Tensor, num_places: int) -> Tensor:
    """Draw from each of ``seeds`` (B,) the index (B,) at which its sample begins an order of ``num_places``."""
    start = uniform(seeds, _ROLL_STREAM, torch.zeros_like(seeds)[:, None]) * num_places
    return start.squeeze(1).long()


def roll_order(order: Tensor, starts: Tensor) -> Tensor:
    """Return ``order`` (L,) rotated to begin at each of ``starts`` (B,): (B, L)."""
    return order[(starts[:, None] + torch.arange(len(order), device=starts.device)) % len(order)]


def _cell(index: Tensor, radix: int, cells: int) -> Tensor:
    """Return which of ``cells`` equal parts of [0, 1) holds the radical inverse of ``index``; exact, in integers."""
    digits, inverse, scale = index, torch.zeros_like(index), 1
    while int(digits.max()):
        inverse, digits, scale = inverse * radix + digits % radix, digits // radix, scale * radix
    return inverse * cells // scale
