from __future__ import annotations

import pytest
import torch
from scipy import stats

from lit_shortcut.decoding.unmasking import exact_cumulative, sample_codes

NEAREST_ZERO, NEAREST_ONE = 0.5 * 2.0**-23, 1 - 0.5 * 2.0**-23


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))


def test_codes_are_drawn_in_proportion_to_their_probabilities() -> None:
    logits = torch.tensor([0.3, -2.0, 1.5, 0.0, -0.7])
    count = 10_000
    evenly = (torch.arange(count) + 0.5) / count
    codes = sample_codes(logits.expand(1, count, -1), evenly[None]).codes
    expected = logits.double().softmax(0) * count
    assert torch.bincount(codes[0], minlength=5).double().sub(expected).abs().max() <= 1


def test_random_uniforms_give_codes_of_the_softmax() -> None:
    logits = torch.randn(16, generator=torch.Generator().manual_seed(1))
    uniforms = torch.rand(1, 20_000, generator=torch.Generator().manual_seed(2))
    drawn = sample_codes(logits.expand(1, 20_000, -1), uniforms).codes
    counts = torch.bincount(drawn[0], minlength=16)
    assert stats.chisquare(counts, logits.double().softmax(0) * 20_000).pvalue > 1e-3


@pytest.mark.parametrize("value", [NEAREST_ZERO, 0.3, 0.5, NEAREST_ONE])
@pytest.mark.parametrize("possible", [[0], [3], [1, 4], [6]])
def test_impossible_codes_are_never_drawn(value: float, possible: list[int]) -> None:
    logits = torch.full((1, 1, 7), -torch.inf)
    logits[..., possible] = 0
    choice = sample_codes(logits, torch.tensor([[value]]))
    assert choice.codes.item() in possible
    assert choice.log_probs.item() == pytest.approx(-torch.tensor(float(len(possible))).log().item())


def test_exact_running_sums_are_those_of_double_precision() -> None:
    probabilities = (torch.randn(50, 8192, generator=torch.Generator().manual_seed(6)) * 4).softmax(-1)
    sums, expected = exact_cumulative(probabilities) * 2.0**-46, probabilities.double().cumsum(-1)
    torch.testing.assert_close(sums.double(), expected, rtol=2e-7, atol=1e-10)
    assert bool((sums.diff(dim=-1) >= 0).all())


def test_extreme_uniforms_give_codes_of_the_codebook() -> None:
    logits = torch.randn(4, 100, 1024, generator=torch.Generator().manual_seed(3)) * 3
    for value, code in ((NEAREST_ZERO, 0), (NEAREST_ONE, 1023)):
        flat = sample_codes(torch.zeros_like(logits), torch.full((4, 100), value)).codes
        assert bool((flat == code).all())
        codes = sample_codes(logits, torch.full((4, 100), value)).codes
        assert 0 <= codes.min()
        assert codes.max() < 1024


def test_without_noise_the_most_probable_code_is_taken(logits: torch.Tensor) -> None:
    choice = sample_codes(logits[0], None)
    assert torch.equal(choice.codes, logits[0].argmax(-1))
    torch.testing.assert_close(choice.log_probs, logits[0].log_softmax(-1).amax(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probs_belong_to_the_codes_drawn(logits: torch.Tensor, dtype: torch.dtype) -> None:
    uniforms = torch.rand(3, 5, generator=torch.Generator().manual_seed(4))
    codes, log_probs = sample_codes(logits[0].to(dtype), uniforms)
    every = logits[0].to(dtype).float().log_softmax(-1)
    assert log_probs.dtype == torch.float32
    assert torch.equal(log_probs, every.gather(-1, codes[..., None])[..., 0])
