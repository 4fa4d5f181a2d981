from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lit_shortcut.metrics.images import collection
from lit_shortcut.metrics.paired import StructuralSimilarity, are_paired
from tests.metrics.asked import asked
from tests.metrics.brightness import Brightness
from tests.metrics.difference import Difference


def images(seed: int, count: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 3, 28, 28), dtype=torch.uint8, generator=generator)


def similarity(first: Tensor, second: Tensor) -> float:
    metric = StructuralSimilarity()
    metric.update(first, asked(torch.zeros(len(first))), second)
    return float(metric.compute())


def test_equal_images_have_similarity_one_and_unrelated_ones_about_none() -> None:
    assert similarity(images(0), images(0)) == 1
    assert abs(similarity(images(0), images(1))) < 0.05


def test_similarity_is_computed_in_float32_whatever_the_trainers_precision() -> None:
    second = (images(0).float() * 0.9).to(torch.uint8)
    expected = similarity(images(0), second)
    with torch.autocast("cpu", torch.bfloat16):
        assert similarity(images(0), second) == expected
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert similarity(images(0), second) == expected
    finally:
        torch.set_default_dtype(default)


@pytest.mark.parametrize(("dark", "bright"), [(0, 255), (100, 120), (255, 51)])
def test_similarity_of_even_images_is_that_of_their_means(dark: int, bright: int) -> None:
    # Without variance only the first factor of Wang et al., equation 13, is left, with c1 = (0.01 · 255)².
    first, second = (torch.full((1, 3, 28, 28), value, dtype=torch.uint8) for value in (dark, bright))
    c1 = (0.01 * 255) ** 2
    assert similarity(first, second) == pytest.approx((2 * dark * bright + c1) / (dark**2 + bright**2 + c1), rel=1e-3)


def test_similarity_is_a_mean_over_images_whatever_the_batches() -> None:
    first, second = images(0), images(0).clone()
    second[:2] = images(1)[:2]
    metric = StructuralSimilarity()
    for rows in (slice(0, 3), slice(3, 5)):
        metric.update(first[rows], asked(torch.zeros(len(first[rows]))), second[rows])
    assert float(metric.compute()) == pytest.approx(similarity(first, second), rel=1e-5)
    assert float(metric.compute()) == pytest.approx((3 + 2 * similarity(first[:2], second[:2])) / 5, rel=1e-5)


def test_only_paired_metrics_of_a_collection_get_originals() -> None:
    metrics = collection({"brightness": Brightness(), "difference": Difference()})
    first = images(0)
    metrics.update(first, conditions=asked(torch.zeros(5)), originals=torch.zeros_like(first))
    values = metrics.compute()
    expected = pytest.approx(float(first.float().mean()), rel=1e-5)
    assert [float(values[name]) for name in ("brightness", "difference")] == [expected, expected]
    assert are_paired({"brightness": Brightness(), "difference": Difference()})
    assert not are_paired({"brightness": Brightness()})
