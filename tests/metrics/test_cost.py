from __future__ import annotations

from collections import Counter

import pytest
import torch

from lit_shortcut.bases.dimoo.published import random_weights
from lit_shortcut.decoding.schedules import tokens_per_step
from lit_shortcut.metrics.cost import Depth, StepCosts, masked_places, num_bytes, num_parameters, step_costs
from lit_shortcut.metrics.memory import LiveMemory
from lit_shortcut.metrics.parts import Laps


def test_vanilla_never_predicts_and_costs_as_many_passes_as_steps() -> None:
    costs = StepCosts(full=3.0, predicted=1e9, head=0.25, choice=0.5)
    assert costs.run(num_steps=64, budget=64) == 64 * 3.75


def test_paper_s_times_agree_with_the_sum_of_steps() -> None:
    """Lumina-DiMOO on the paper's GPU: 23.2 s in 64 full steps, and 5.75, 4.71, 3.99 s with 14, 11, 9 of them full."""
    full = 23.2 / 64
    costs = StepCosts(full, predicted=(5.75 - 14 * full) / 50, head=0.0, choice=0.0)
    assert [costs.run(64, budget) for budget in (14, 11, 9)] == pytest.approx([5.75, 4.71, 3.99], abs=0.03)


def test_places_masked_are_those_not_yet_committed() -> None:
    counts = tokens_per_step("cosine_left", num_steps=64, num_tokens=4096)
    places = masked_places(counts)
    assert (places[0], places[-1]) == (4096, counts[-1])
    assert all(before - after == count for before, after, count in zip(places, places[1:], counts, strict=False))


def test_costs_of_a_step_come_from_the_first_steps_of_a_run() -> None:
    laps = Laps(torch.device("cpu"))
    laps.seconds = {"base": 1.0, "layer": 6.0, "predicted": 4.0, "head": 1.8, "token choice": 0.9, "rest": 7.0}
    laps.calls = Counter({"base": 1, "layer": 4, "predicted": 2})
    costs = step_costs(laps, Depth(built=2, published=32), places=[8, 6, 4, 2], steps=3)
    assert costs == pytest.approx(StepCosts(full=97.0, predicted=2.0, head=0.5, choice=0.25))


def test_lumina_dimoo_has_its_number_of_parameters_at_published_size() -> None:
    base = random_weights(device="meta")
    layer = 4 * 4096 * 4096 + 3 * 4096 * 12288 + 2 * 4096
    assert num_parameters(base) == 32 * layer + 2 * 134_548 * 4096 + 4096 == 8_081_805_312
    assert num_bytes(base) == 2 * 8_081_805_312


def test_memory_of_views_is_that_of_what_they_show_and_memory_of_the_dead_is_free() -> None:
    weights = torch.zeros(100)
    with LiveMemory() as memory:
        view = weights.view(10, 10).T
        assert (memory.live, memory.peak) == (0, 0)
        doubled = view * 2
        flat = doubled.flatten()  # a copy: doubled is no longer contiguous
        flat += 1
        assert memory.live == 800
        del doubled
        assert (memory.live, memory.peak) == (400, 800)
        part = flat[:3]
        del flat
        assert memory.live == 400
        del part
        assert (memory.live, memory.peak) == (0, 800)


def test_memory_taken_is_the_same_on_the_meta_device() -> None:
    def peak(device: str) -> int:
        layer, rows = torch.nn.Linear(8, 16, device=device), torch.ones(4, 8, device=device)
        with torch.inference_mode(), LiveMemory() as memory:
            layer(rows).relu().sum()
        return memory.peak

    assert peak("cpu") == peak("meta") == 2 * 4 * 16 * 4
