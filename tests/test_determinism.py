"""Same seed, same bits, on the shipped base: trajectories and weights, whatever the batch size and number of ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lit_shortcut.acceleration.shortcut import Shortcut
from lit_shortcut.contracts import Trajectories
from lit_shortcut.trajectory import Card, read_shard
from tests.command_line import CONFIGS, lightning

FASHION = CONFIGS / "fashion"
SET = "runs/fashion/trajectories"
WEIGHTS = "runs/fashion/shortcut/model.safetensors"


def record(folder: Path, *words: object) -> Path:
    """Three images of the shipped base in six steps."""
    folder.mkdir()
    (folder / "checkpoints").symlink_to(CONFIGS.parent / "checkpoints")
    size = ("--data.num_images=3", "--model.decoding.num_steps=6")
    lightning(folder, "predict", "--config", FASHION / "extract.yaml", *size, "--trainer.accelerator=cpu", *words)
    return folder / SET


def samples(source: Path) -> list[Trajectories]:
    card = Card.read(source)
    return [one for shard in range(card.num_shards) for one in read_shard(source, shard, card)]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One image a shard."""
    return record(tmp_path_factory.mktemp("recorded") / "one", "--data.batch_size=1")


def test_same_seed_records_the_same_bytes_and_another_seed_others(recorded: Path, tmp_path: Path) -> None:
    again, other = record(tmp_path / "again", "--data.batch_size=1"), record(tmp_path / "other", "--data.seed=9")
    for path in recorded.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes(), path.name
    for one, another in zip(samples(recorded), samples(other), strict=True):
        assert not torch.equal(one.tokens, another.tokens)


@pytest.mark.parametrize(
    "how",
    [("--data.batch_size=3",), ("--data.batch_size=2", "--trainer.strategy=ddp_fork", "--trainer.devices=2")],
    ids=["another batch size", "two ranks"],
)
def test_image_depends_neither_on_its_batch_nor_on_its_rank(
    recorded: Path, tmp_path: Path, how: tuple[str, ...]
) -> None:
    for alone, together in zip(samples(recorded), samples(record(tmp_path / "other", *how)), strict=True):
        assert alone.conditions == together.conditions  # of one sample
        assert torch.equal(alone.tokens, together.tokens)
        assert torch.equal(alone.committed_at, together.committed_at)
        # kernels sum in another order for another number of rows, and bfloat16 rounds the difference up to a step
        torch.testing.assert_close(alone.features.float(), together.features.float(), rtol=2**-7, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")
def test_same_seed_trains_the_same_weights_and_another_seed_others(recorded: Path) -> None:
    folder = recorded.parents[2]
    short = (
        "--trainer.max_steps=3",
        "--trainer.val_check_interval=3",
        "--trainer.callbacks=null",
        "--trainer.enable_checkpointing=false",
    )
    export = {"path": WEIGHTS, "licence": "Apache-2.0", "trained_on": "three images"}
    words = [f"--trainer.callbacks.{name}={value}" for name, value in export.items()]
    found = []
    for seed in (0, 0, 1):
        command = (
            "fit",
            "--config",
            FASHION / "fit.yaml",
            *short,
            "--trainer.callbacks+=lit_shortcut.callbacks.export.ExportWeights",
            *words,
        )
        size = (
            "--data.batch_size=8",
            "--data.max_gap=3",
            "--data.validation_shards=1",
            "--trainer.logger=false",
            "--trainer.accelerator=cpu",
        )
        lightning(folder, *command, *size, f"--seed_everything={seed}")
        found.append(Shortcut.load(folder / WEIGHTS).identity()["weights"])
    assert found[0] == found[1] != found[2]
