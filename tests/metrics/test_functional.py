from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.nn import functional as F

from lit_shortcut.metrics.functional import (
    centred_cosine,
    gain_over_hold,
    head_kl,
    masked_cosine,
    masked_mean,
    masked_mse,
    mean_interval,
    token_agreement,
)

BATCH, TOKENS, SEQUENCE, WIDTH = 3, 5, 7, 4


@pytest.fixture
def features() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, BATCH, SEQUENCE, WIDTH, generator=generator)
    return a, b, torch.rand(BATCH, TOKENS, generator=generator) < 0.5


def test_masked_mse_equals_the_mean_over_chosen_rows(features: tuple[Tensor, Tensor, Tensor]) -> None:
    a, b, is_masked = features
    expected = F.mse_loss(a[:, :TOKENS][is_masked], b[:, :TOKENS][is_masked])
    torch.testing.assert_close(masked_mse(a, b, is_masked), expected)


def test_masked_mse_takes_windows_of_steps(features: tuple[Tensor, Tensor, Tensor]) -> None:
    a, b, is_masked = features
    window = masked_mse(a[:, None], b[:, None], is_masked[:, None])
    torch.testing.assert_close(window, masked_mse(a, b, is_masked))


def test_masked_cosine_equals_the_mean_over_chosen_rows(features: tuple[Tensor, Tensor, Tensor]) -> None:
    a, b, is_masked = features
    expected = F.cosine_similarity(a[:, :TOKENS][is_masked], b[:, :TOKENS][is_masked]).mean()
    torch.testing.assert_close(masked_cosine(a, b, is_masked), expected)
    torch.testing.assert_close(masked_cosine(a, 3 * a, is_masked), torch.tensor(1.0))


def test_what_is_not_masked_does_not_count(features: tuple[Tensor, Tensor, Tensor]) -> None:
    a, b, is_masked = features
    other = a.clone()
    other[:, :TOKENS][~is_masked] = math.nan
    other[:, TOKENS:] = math.nan
    assert masked_mse(other, b, is_masked) == masked_mse(a, b, is_masked)
    assert masked_cosine(other, b, is_masked) == masked_cosine(a, b, is_masked)


def test_nothing_masked_gives_zero_and_zero_gradient(features: tuple[Tensor, Tensor, Tensor]) -> None:
    a, b, is_masked = features
    a.requires_grad_()
    loss = masked_mse(a, b, torch.zeros_like(is_masked))
    (gradient,) = torch.autograd.grad(loss, a)
    assert loss == 0
    assert not gradient.any()
    assert masked_mean(torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool)) == 0


def test_half_precision_does_not_overflow() -> None:
    large = torch.full((1, 1, 2), 1000.0, dtype=torch.float16)
    assert masked_mse(large, -large, torch.tensor([[True]])) == 2000.0**2


def test_centred_cosine_ignores_a_common_part(features: tuple[Tensor, Tensor, Tensor]) -> None:
    a, b, is_masked = features
    centre = torch.full((WIDTH,), 100.0, dtype=torch.float64)
    shifted = centred_cosine(a + centre, b + centre, is_masked, centre)
    torch.testing.assert_close(shifted, masked_cosine(a, b, is_masked), check_dtype=False)


def test_gain_is_zero_for_holding_and_one_for_perfection() -> None:
    hold = torch.tensor([2.0, 2.0, 2.0])
    assert gain_over_hold(torch.tensor([2.0, 0.0, 4.0]), hold).tolist() == [0, 1, -1]


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_head_kl_equals_the_divergence_of_distributions(temperature: float) -> None:
    generator = torch.Generator().manual_seed(1)
    target, prediction = torch.randn(2, BATCH, TOKENS, 6, generator=generator)
    distributions = [torch.distributions.Categorical(logits=logits / temperature) for logits in (target, prediction)]
    expected = torch.distributions.kl_divergence(*distributions) * temperature**2
    torch.testing.assert_close(head_kl(target, prediction, temperature), expected)
    assert (head_kl(target, prediction, temperature) > 0).all()
    torch.testing.assert_close(head_kl(target, target + 3.0), torch.zeros(BATCH, TOKENS))


def test_token_agreement_counts_masked_places_alone() -> None:
    logits = F.one_hot(torch.tensor([[0, 1, 2, 1]])).float()
    targets = F.one_hot(torch.tensor([[0, 2, 2, 2]])).float()
    assert token_agreement(logits, targets, torch.tensor([[True, True, False, False]])) == 0.5
    assert token_agreement(logits, targets, torch.tensor([[True, False, True, False]])) == 1


@pytest.mark.parametrize("count", [2, 3, 5, 10, 11, 40])
def test_interval_equals_scipys(count: int) -> None:
    values = [math.sin(k) for k in range(count)]
    low, high = stats.t.interval(0.95, count - 1, loc=sum(values) / count, scale=stats.sem(values))
    mean, half_width = mean_interval(values)
    assert mean == pytest.approx((low + high) / 2)
    assert half_width == pytest.approx((high - low) / 2, rel=1e-4)


def test_interval_of_one_value_is_unknown_and_of_none_refused() -> None:
    mean, half_width = mean_interval([3.0])
    assert mean == 3
    assert math.isnan(half_width)
    with pytest.raises(ValueError, match="at least one"):
        mean_interval([])
