from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.stats import qmc

from lit_shortcut.decoding.halton import halton_order, roll_order, rolled_starts

GRIDS = [(1, 1), (1, 5), (14, 14), (16, 16), (27, 9), (32, 32), (20, 48)]


@pytest.mark.parametrize(("height", "width"), GRIDS)
def test_every_place_comes_exactly_once(height: int, width: int) -> None:
    assert torch.equal(halton_order(height, width).sort().values, torch.arange(height * width))


@pytest.mark.parametrize(("height", "width"), [(14, 14), (16, 8), (32, 32), (20, 40)])
def test_places_come_as_the_points_of_an_independent_halton_sequence_meet_them(height: int, width: int) -> None:
    """No width here is a multiple of 3: then no point in base 3 lies on a border, where floating point may slip."""
    sequence = qmc.Halton(2, scramble=False)
    sequence.fast_forward(1)  # the point of index 0 is the corner
    cells = np.floor(sequence.random(20_000) * [height, width]).astype(int) @ [width, 1]
    assert halton_order(height, width).tolist() == list(dict.fromkeys(cells.tolist()))


@pytest.mark.parametrize("side", [16, 32])
@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_first_places_are_as_even_as_halton_points_and_evener_than_chance(side: int, share: float) -> None:
    def discrepancy(places: torch.Tensor) -> float:
        points = torch.stack([places // side, places % side], dim=1).double()
        return float(qmc.discrepancy(((points + 0.5) / side).numpy(), method="L2-star"))

    count = round(share * side * side)
    ours = discrepancy(halton_order(side, side)[:count])
    # centres of cells stand for points, half a cell away at most
    sequence = qmc.Halton(2, scramble=False)
    sequence.fast_forward(1)
    assert ours < float(qmc.discrepancy(sequence.random(count), method="L2-star")) + 0.5 / side
    generator = torch.Generator().manual_seed(0)
    chance = [discrepancy(torch.randperm(side * side, generator=generator)[:count]) for _ in range(20)]
    assert ours < min(chance)


def test_rolled_order_is_the_order_begun_elsewhere() -> None:
    order = halton_order(4, 4)
    for start, row in enumerate(roll_order(order, torch.arange(16))):
        assert torch.equal(row, order.roll(-start))


def test_start_depends_on_the_seed_only_and_is_uniform() -> None:
    seeds = torch.arange(9000) * 7 - 500
    starts = rolled_starts(seeds, 9)
    assert torch.equal(rolled_starts(seeds.flip(0), 9), starts.flip(0))
    assert stats.chisquare(torch.bincount(starts, minlength=9)).pvalue > 1e-3
