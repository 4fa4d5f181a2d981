from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lit_shortcut.decoding import noise
from lit_shortcut.decoding.noise import bfloat16_gumbel, gumbel, uniform, uniform_by_code

ALL_BITS = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15
# the first outputs of SplitMix64 from state 1234567, as other implementations of it list them
KNOWN_STATE = 1234567
KNOWN_OUTPUTS = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
SEEDS = [0, 1, -1, 7, 2**63 - 1, -(2**63), 123456789012345]


def finalise(x: int) -> int:
    """SplitMix64's finaliser in unbounded integers, cut to 64 bits."""
    x &= ALL_BITS
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & ALL_BITS
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & ALL_BITS
    return x ^ (x >> 31)


def reference_uniform(seed: int, stream: int, position: int) -> float:
    key = finalise(finalise(seed) + (stream + 1) * GOLDEN)
    bits = finalise(key + (position + 1) * GOLDEN)
    return ((bits >> 41) + 0.5) / 2**23


def draw(seeds: int, positions: int, stream: int = 0, first_seed: int = 0) -> Tensor:
    """Values (seeds, positions) in double precision."""
    all_seeds = torch.arange(first_seed, first_seed + seeds)
    return uniform(all_seeds, stream, torch.arange(positions).expand(seeds, -1)).double()


@pytest.mark.parametrize(("index", "output"), list(enumerate(KNOWN_OUTPUTS)))
def test_finaliser_gives_the_known_outputs(index: int, output: int) -> None:
    state = (KNOWN_STATE + (index + 1) * GOLDEN) & ALL_BITS
    signed = state - 2**64 if state >= 2**63 else state
    assert int(noise._mix(torch.tensor([signed]))) & ALL_BITS == output
    assert finalise(state) == output


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("stream", [0, 1, 31, 127])
def test_values_equal_unbounded_integer_arithmetic(seed: int, stream: int) -> None:
    positions = [0, 1, 2, 195, 1023, 4095]
    values = uniform(torch.tensor([seed]), stream, torch.tensor([positions]))
    assert values.dtype == torch.float32
    assert values[0].tolist() == [reference_uniform(seed, stream, position) for position in positions]


@pytest.mark.parametrize("hashed", [0, -1])
def test_extreme_hashes_stay_inside_the_open_interval(hashed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "_mix", lambda x: torch.full_like(x, hashed))
    value = draw(1, 1).float()
    assert 0 < value.item() < 1
    assert bool(gumbel(value).isfinite())


def test_gumbel_noise_in_bfloat16_ends_where_its_numbers_do() -> None:
    values = torch.linspace(2**-24, 1 - 2**-24, 2**20)
    found = bfloat16_gumbel(values)
    assert found.dtype == torch.bfloat16
    assert (3.8 < -found.min() < 3.9, 5.5 < found.max() < 5.6) == (True, True)
    assert bool((found[values > 511 / 512] == found.min()).all())  # rounded to 1, which CUDA gives as 0
    middle = (0.01 < values) & (values < 0.9)
    torch.testing.assert_close(found[middle].float(), gumbel(values[middle]), atol=0.05, rtol=0.05)


def test_values_by_code_are_uniform_and_independent() -> None:
    places = torch.arange(64).expand(8, -1)
    values = uniform_by_code(torch.arange(8), 3, places, 1024).double()
    assert values.shape == (8, 64, 1024)
    assert stats.kstest(values.flatten().numpy(), "uniform").pvalue > 1e-3
    centred = values - 0.5
    for shifted in (centred.roll(1, 0), centred.roll(1, 1), centred.roll(1, 2), centred.roll((1, 7), (1, 2))):
        assert abs(float((centred * shifted).mean())) < 5 / 12 / centred.numel() ** 0.5
    of_rows, of_codes = values.mean((0, 1)), values.mean(2)
    assert float((of_rows - 0.5).abs().max()) < 5 / (12 * 8 * 64) ** 0.5
    assert float((of_codes - 0.5).abs().max()) < 5 / (12 * 1024) ** 0.5


def test_values_by_code_belong_to_seed_stream_and_place() -> None:
    seeds, places = torch.tensor([3, -7, 2**62]), torch.tensor([[0, 5, 4095], [5, 0, 1], [9, 8, 7]])
    together = uniform_by_code(seeds, 4, places, 16)
    assert torch.equal(uniform_by_code(seeds[1:2], 4, places[1:2, :2], 16), together[1:2, :2])
    assert not torch.equal(uniform_by_code(seeds, 5, places, 16), together)
    assert not torch.equal(together[0, 0], together[1, 1])  # the same place, another seed
    assert not torch.equal(together[0, 0], together[0, 1])


def test_values_by_code_are_made_in_32_bits() -> None:
    made: list[torch.dtype] = []

    class Large(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = func(*args, **(kwargs or {}))
            if isinstance(found, Tensor) and found.numel() == 4 * 64 * 512 and not func._schema.is_mutable:
                made.append(found.dtype)
            return found

    with Large():
        uniform_by_code(torch.arange(4), 0, torch.arange(64).expand(4, -1), 512)
    assert len(made) == 6  # four shifts, the sum and the float
    assert all(dtype.itemsize == 4 for dtype in made)


@pytest.mark.parametrize(("seeds", "positions"), [(1, 400_000), (400_000, 1), (2000, 200)])
def test_values_are_uniform(seeds: int, positions: int) -> None:
    values = draw(seeds, positions).flatten().numpy()
    count = len(values)
    assert 0 < values.min() < 1e-4
    assert 1 - 1e-4 < values.max() < 1
    assert abs(values.mean() - 1 / 2) < 4 * (1 / 12 / count) ** 0.5
    assert abs(values.var() - 1 / 12) < 4 * (1 / 180 / count) ** 0.5
    histogram = np.histogram(values, bins=256, range=(0, 1))[0]
    assert stats.chisquare(histogram).pvalue > 1e-3
    assert stats.kstest(values, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("seed_stride", [1, 2**20, 2**32, 2**48])
def test_structured_seeds_give_uniform_values(seed_stride: int) -> None:
    seeds = torch.arange(2**14) * seed_stride
    values = uniform(seeds, 0, torch.zeros(len(seeds), 1, dtype=torch.long)).flatten().numpy()
    assert stats.chisquare(np.histogram(values, bins=64, range=(0, 1))[0]).pvalue > 1e-3


def neighbours(kind: str) -> tuple[Tensor, Tensor]:
    values = draw(1000, 200)
    match kind:
        case "seeds":
            return values[:-1], values[1:]
        case "positions":
            return values[:, :-1], values[:, 1:]
        case "streams":
            return values, draw(1000, 200, stream=1)
        case "seed and position":  # a counter that only adds would repeat itself along a diagonal
            return values[:-1, 1:], values[1:, :-1]
        case "stream and position":
            return values[:, 1:], draw(1000, 200, stream=1)[:, :-1]
        case "seed and stream":
            return values[1:], draw(1000, 200, stream=1)[:-1]
    raise AssertionError(kind)


@pytest.mark.parametrize(
    "kind", ["seeds", "positions", "streams", "seed and position", "stream and position", "seed and stream"]
)
def test_neighbours_are_independent(kind: str) -> None:
    one, other = (side.flatten().numpy() for side in neighbours(kind))
    assert abs(np.corrcoef(one, other)[0, 1]) < 4 / len(one) ** 0.5
    table = np.histogram2d(one, other, bins=16, range=[[0, 1], [0, 1]])[0]
    assert stats.chisquare(table.ravel()).pvalue > 1e-3


def test_streams_drawn_together_are_those_drawn_one_by_one() -> None:
    seeds, positions, streams = torch.tensor([5, 7]), torch.arange(16), torch.arange(128)
    together = uniform(seeds, streams, positions)
    assert together.shape == (128, 2, 16)
    assert all(torch.equal(part, uniform(seeds, stream, positions)) for stream, part in enumerate(together))
    assert len(together.flatten(0, 1).unique(dim=0)) == 256


def test_value_follows_its_position_wherever_it_stands() -> None:
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(
        uniform(torch.tensor([3]), 4, order[None])[0], uniform(torch.tensor([3]), 4, torch.arange(50)[None])[0, order]
    )


def test_gumbel_of_uniform_is_gumbel() -> None:
    values = gumbel(draw(1, 100_000, stream=9)).flatten().numpy()
    assert stats.kstest(values, "gumbel_r").pvalue > 1e-3
    assert abs(values.mean() - np.euler_gamma) < 4 * np.pi / 6**0.5 / 100_000**0.5


@pytest.mark.parametrize("value", [0.1, 0.5, 0.9])
def test_gumbel_is_the_inverse_of_its_distribution(value: float) -> None:
    assert gumbel(torch.tensor(value, dtype=torch.float64)).item() == pytest.approx(stats.gumbel_r.ppf(value))
