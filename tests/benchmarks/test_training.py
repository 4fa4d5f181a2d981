from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import yaml

from benchmarks import training
from benchmarks.training import SIZES, Size, measure, random_pairs, task_of
from tests.command_line import CONFIGS

TINY = Size(
    "tiny",
    {"width": 16, "num_heads": 2},
    num_tokens=9,
    codebook_size=5,
    num_steps=4,
    kl_weight=0.5,
    batch_size=6,
    rounds=2,
)


@pytest.mark.parametrize(("size", "base"), zip(SIZES, ("fashion", "maskgit"), strict=True))
def test_measured_network_is_that_of_the_configuration(size: Size, base: str) -> None:
    model = yaml.safe_load((CONFIGS / base / "fit.yaml").read_text())["model"]["init_args"]
    assert size.network == model["network"]["init_args"]
    assert size.kl_weight == ("kl" in model.get("losses", {}))


def test_all_ways_are_measured_on_the_same_loss() -> None:
    loop, single, half = measure([replace(TINY, precisions=("float32", "bfloat16"))]).rows
    assert [way["batch"] for way in (loop, single, half)] == [1, 6, 6]
    assert [way["precision"] for way in (loop, single, half)] == ["float32", "float32", "bfloat16"]
    assert loop["ratio"] == 1
    for way in (single, half):
        assert way["ratio"] == pytest.approx(way["pairs/s"] / loop["pairs/s"], rel=0.1)
        assert way["loss a pair"] == pytest.approx(loop["loss a pair"], rel=0.02) != 0


def test_pairs_are_of_all_steps() -> None:
    assert random_pairs(TINY).step.tolist() == [0, 0, 1, 1, 2, 2]


def test_other_loss_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    single = training._single
    monkeypatch.setattr(training, "_single", lambda batch, row: single(batch, 0))
    with pytest.raises(ValueError, match="tiny, batches, float32: the loss of a pair is"):
        measure([TINY])


def test_measuring_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    task_of(TINY)
    random_pairs(TINY)
    assert torch.equal(torch.get_rng_state(), before)
