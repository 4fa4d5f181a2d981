from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from lit_shortcut.bench_data import training
from lit_shortcut.bench_data.training import SIZES, Size, bench_training, random_pairs, task_of
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
    assert size.kl_weight == model.get("kl_weight", 0)


def test_all_ways_are_measured_on_the_same_loss() -> None:
    loop, single, half = bench_training([replace(TINY, precisions=("float32", "bfloat16"))]).to_dict("records")
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
        bench_training([TINY])


def test_measuring_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    task_of(TINY)
    random_pairs(TINY)
    assert torch.equal(torch.get_rng_state(), before)


def test_table_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(training, "rank_zero_info", said.append)
    monkeypatch.setattr(training, "bench_training", lambda: bench_training([TINY]))
    training.main(tmp_path / "new" / "training.json")
    rows = json.loads((tmp_path / "new" / "training.json").read_text())
    assert [row["way"] for row in rows] == ["single pairs", "batches, float32"]
    assert "| tiny" in said[0]
