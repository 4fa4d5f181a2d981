"""Each verb on two processes, through the command line, does what it does on one."""

from __future__ import annotations

import csv
import json
import os
import shutil
from itertools import count
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.multiprocessing import ProcessRaisedException

import lit_shortcut.tasks.recording
from datamodules.online import OnlineDataModule
from datamodules.trajectories import TrajectoryDataModule
from lit_shortcut.contracts import Conditions, Trajectories
from lit_shortcut.fashion.classifier import FashionCNN, FashionFeatures
from lit_shortcut.losses import MaskedMSE
from lit_shortcut.networks.shortcut import ShortcutNet
from lit_shortcut.tasks.shortcut import ShortcutTask
from lit_shortcut.weights import fingerprint, save_module
from tests.command_line import TOY, fresh_process, lightning
from tests.metrics.reference import write_reference

TWO = ("--trainer.strategy=ddp_fork", "--trainer.devices=2")
SET = "runs/toy/trajectories"
WEIGHTS = "runs/toy/shortcut/last.ckpt"
LOSSES = json.dumps(
    {
        "mse": {"class_path": "lit_shortcut.losses.MaskedMSE"},
        "kl": {"class_path": "lit_shortcut.losses.HeadKL", "init_args": {"weight": 0.5}},
    }
)
UNEVEN = ("--data.num_images=10", "--data.batch_size=4")  # batches of 4, 4 and 2 for two ranks


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trajectories in uneven shards, and a shortcut trained on them, by one process."""
    folder = tmp_path_factory.mktemp("one")
    lightning(folder, "predict", "--config", TOY / "extract.yaml", *UNEVEN)
    lightning(folder, "fit", "--config", TOY / "fit.yaml", "--trainer.logger=false", "--model.optimizer.lr=0.1")
    return folder


def logged(folder: Path, logs: Path, *words: object) -> dict[str, list[float]]:
    """Values of each metric in the order in which the command logged them, run in a process of its own."""
    logger = ("--trainer.logger=lightning.pytorch.loggers.CSVLogger", f"--trainer.logger.save_dir={logs}")
    process = fresh_process(lightning, folder, *words, *logger)
    process.start()
    process.join()
    assert process.exitcode == 0
    (path,) = logs.glob("*/version_0/metrics.csv")
    with path.open() as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows if row[name]] for name in rows[0]}


def test_ranks_record_different_samples_which_together_are_the_set_of_one_process(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = lit_shortcut.tasks.recording.record

    def noted(base: Any, conditions: Conditions, decoding: Any, *room: Any) -> Trajectories:
        with (tmp_path / f"drawn_by_{os.getpid()}").open("a") as file:
            file.writelines(f"{number}\n" for number in conditions.ids.tolist())
        return record(base, conditions, decoding, *room)

    monkeypatch.setattr(lit_shortcut.tasks.recording, "record", noted)
    lightning(tmp_path, "predict", "--config", TOY / "extract.yaml", *UNEVEN, *TWO)
    one, two = ({path.name: path.read_bytes() for path in (where / SET).iterdir()} for where in (trained, tmp_path))
    assert two == one
    drawn = [[int(line) for line in path.read_text().split()] for path in tmp_path.glob("drawn_by_*")]
    assert sorted(drawn) == [[0, 1, 2, 3, 8, 9], [4, 5, 6, 7]]


NETWORK = "--model.network.init_args"


@pytest.mark.parametrize(
    "steps",
    [
        ("--data.window=2",),
        ("--data.max_gap=3", f"{NETWORK}.anchored=true", f"{NETWORK}.rows=masked"),
        ("--data.guided=true", f"{NETWORK}.guided=true"),
    ],
    ids=["window", "gaps", "guided"],
)
def test_two_ranks_train_as_one_of_twice_the_batch(trained: Path, tmp_path: Path, steps: tuple[str, ...]) -> None:
    shutil.copytree(trained / SET, tmp_path / SET)
    long = ("--trainer.max_steps=20", "--trainer.val_check_interval=5", *steps, f"--model.losses={LOSSES}")
    command = ("fit", "--config", TOY / "fit.yaml", *long, "--data.validation_shards=1", "--trainer.callbacks=null")
    one = logged(tmp_path, tmp_path / "one", *command, "--data.batch_size=8")
    two = logged(tmp_path, tmp_path / "two", *command, "--data.batch_size=4", *TWO)
    assert len(one["train/loss"]) == 20
    assert len(one["val/mse"]) == 4
    for name in ("train/loss", "train/mse", "train/kl", "train/cosine", "val/mse", "val/head_kl"):
        assert two[name] == pytest.approx(one[name], rel=1e-5), name
    counted = logged(tmp_path, tmp_path / "counted", *command, "--data.batch_size=4", *TWO, "--data.on_corrupt=skip")
    assert counted["train/loss"] == pytest.approx(one["train/loss"], rel=1e-5)


def test_ranks_train_without_sending_how_many_places_are_masked(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / SET, tmp_path / SET)
    process = fresh_process(_fit_and_note_reductions, tmp_path)
    process.start()
    process.join()
    assert process.exitcode == 0
    assert len((tmp_path / "reductions").read_text().split()) == 2 * 2  # ranks, and two of 8 steps log


def _fit_and_note_reductions(folder: Path) -> None:
    def reduction(values: torch.Tensor) -> torch.Tensor:
        with (folder / "reductions").open("a") as file:
            file.write("one\n")
        return values

    quiet = ("--trainer.callbacks=null", "--trainer.logger=false", "--trainer.enable_checkpointing=false", *TWO)
    few = ("--trainer.log_every_n_steps=4", "--trainer.limit_val_batches=0", "--data.batch_size=4")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lit_shortcut.tasks.shortcut.sum_over_ranks", reduction)
        lightning(folder, "fit", "--config", TOY / "fit.yaml", *quiet, *few)


def test_ranks_draw_different_pools_on_policy_with_the_same_weights(tmp_path: Path) -> None:
    pools = {}
    for ranks, words in ((1, ()), (2, TWO)):
        process = fresh_process(_fit_on_policy_and_note_pools, tmp_path / str(ranks), words)
        process.start()
        process.join()
        assert process.exitcode == 0
        lines = (tmp_path / str(ranks) / "pools").read_text().splitlines()
        pools[ranks] = {int(number): (rank, weights, tokens) for rank, number, weights, tokens in map(str.split, lines)}
    assert [pools[2][number][0] for number in range(4)] == ["0", "1", "0", "1"]
    first, second = ({pools[2][number][1] for number in numbers} for numbers in ((0, 1), (2, 3)))
    assert len(first) == len(second) == 1  # DistributedDataParallel kept them alike
    assert first != second
    assert pools[2][0][1:] == pools[1][0][1:]  # the order of pools is shuffled alike, the first weights are the same
    assert pools[2][1][2] != pools[1][1][2]  # one process has trained by then


def _fit_on_policy_and_note_pools(folder: Path, words: tuple[str, ...]) -> None:
    folder.mkdir()
    draw, turns = OnlineDataModule._draw_pool, count()

    def noted(self: Any, epoch: int, number: int) -> Trajectories:
        pool, trainer = draw(self, epoch, number), self.trainer
        digests = (
            fingerprint({"": trainer.lightning_module.network.widen.weight}),
            fingerprint({"": pool.tokens}),
        )
        turn = next(turns) * trainer.world_size + trainer.global_rank
        with (folder / "pools").open("a") as file:
            file.write(f"{trainer.global_rank} {turn} {' '.join(digests)}\n")
        return pool

    online = (
        "--config",
        TOY / "fit_online.yaml",
        "--data.on_policy_budget=2",
        "--data.conditions.init_args.num_images=16",
    )
    quiet = ("--trainer.callbacks=null", "--trainer.logger=false", "--trainer.enable_checkpointing=false")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OnlineDataModule, "_draw_pool", noted)
        lightning(folder, "fit", "--config", TOY / "fit.yaml", *online, *quiet, "--trainer.limit_val_batches=0", *words)


@pytest.mark.parametrize("at", ["log", "checkpoint"])
def test_loss_that_is_not_finite_on_one_rank_ends_both_with_one_message(trained: Path, tmp_path: Path, at: str) -> None:
    shutil.copytree(trained / SET, tmp_path / SET)
    process = fresh_process(_fit_with_a_loss_that_explodes, tmp_path, at)
    process.start()
    process.join(timeout=120)
    assert process.exitcode == 0
    first, second = ((tmp_path / f"rank{rank}").read_text() for rank in range(2))
    assert first == second
    assert "training loss is nan at optimiser step 3" in first


class _Exploding(MaskedMSE):
    """NaN from the third call on, on the second rank only."""

    calls = 0

    def __call__(self, *arguments: Any) -> torch.Tensor:
        self.calls += 1
        loss = super().__call__(*arguments)
        return loss * torch.nan if self.calls > 2 and torch.distributed.get_rank() == 1 else loss


class _Noted(ShortcutTask):
    """Each rank writes why it ends; then they wait for each other, lest the first one's end kills the other."""

    folder: Path

    def _require_finite(self, loss: float) -> None:
        try:
            super()._require_finite(loss)
        except ValueError as error:
            (self.folder / f"rank{self.global_rank}").write_text(str(error))
            torch.distributed.barrier()
            raise


def _fit_with_a_loss_that_explodes(folder: Path, at: str) -> None:
    task = _Noted(ShortcutNet(16, num_heads=2), losses={"mse": _Exploding()})
    task.folder = folder
    trainer = L.Trainer(
        accelerator="cpu",
        strategy="ddp_fork",
        devices=2,
        max_steps=8,
        limit_val_batches=0,
        log_every_n_steps={"log": 4, "checkpoint": 100}[at],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=at == "checkpoint",
        callbacks=[ModelCheckpoint(folder / "saved", every_n_train_steps=3)] if at == "checkpoint" else [],
    )
    with pytest.raises(ProcessRaisedException):
        trainer.fit(task, datamodule=TrajectoryDataModule(str(folder / SET), batch_size=4))


def test_ranks_validate_to_the_metrics_of_one_process(trained: Path, tmp_path: Path) -> None:
    command = ("validate", "--config", TOY / "fit.yaml", f"--ckpt_path={WEIGHTS}")
    uneven = ("--data.validation_shards=2", "--data.validation_batch_size=4")
    one = logged(trained, tmp_path / "one", *command, *uneven)
    two = logged(trained, tmp_path / "two", *command, *uneven, *TWO)
    names = {name for name in one if name.startswith("val/")}
    assert {"val/mse", "val/rollout_gain_3", "val/head_kl", "val/token_agreement"} <= names
    assert one["val/gain"][0] != 0
    for name in names:
        rel = 1e-4 if name.endswith("cosine_gain") else 1e-5  # 1 − cosine cancels
        assert two[name] == pytest.approx(one[name], rel=rel), name


@pytest.fixture
def metrics(tmp_path: Path) -> str:
    """For the command line: Fréchet distance and class agreement by a random network."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        classifier = FashionCNN(width=2)
    save_module(tmp_path / "classifier.safetensors", classifier)
    pixels = torch.randint(0, 256, (50, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    write_reference(tmp_path / "reference.safetensors", FashionFeatures(classifier), [pixels], "random pixels")
    extractor = {
        "class_path": "lit_shortcut.fashion.classifier.FashionFeatures.load",
        "init_args": {"path": str(tmp_path / "classifier.safetensors")},
    }
    arguments = {"extractor": extractor, "reference": str(tmp_path / "reference.safetensors")}
    agreement = {
        "class_path": "lit_shortcut.metrics.images.ClassAgreement",
        "init_args": {
            "classifier": {
                "class_path": "lit_shortcut.fashion.classifier.FashionCNN.load",
                "init_args": {"path": str(tmp_path / "classifier.safetensors")},
            }
        },
    }
    metric = {"class_path": "lit_shortcut.metrics.distances.FrechetDistance", "init_args": arguments}
    return json.dumps({"fid": metric, "class_agreement": agreement})


def test_ranks_measure_images_to_the_values_of_one_process(trained: Path, tmp_path: Path, metrics: str) -> None:
    command = (
        "test",
        "--config",
        TOY / "evaluate.yaml",
        *UNEVEN,
        f"--model.metrics={metrics}",
        "--trainer.logger=false",
    )
    found = []
    for name, ranks in (("one", ()), ("two", TWO)):
        lightning(trained, *command, f"--model.results={tmp_path / name}", *ranks)
        found.append({path.name: json.loads(path.read_text()) for path in (tmp_path / name / "rows").iterdir()})
    one, two = found
    assert len(one) == 8
    assert one.keys() == two.keys()
    for name, row in one.items():
        assert row["values"]["fid"] > 0
        assert two[name]["identity"] == row["identity"]
        assert two[name]["values"] == pytest.approx(row["values"], rel=1e-9), name
