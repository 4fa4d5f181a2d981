from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from datamodules.trajectories import TrajectoryDataModule
from lit_shortcut.acceleration.calibrated import Calibrated, CalibratedAdaptive, PlanFile
from lit_shortcut.acceleration.linear import Linear, save
from lit_shortcut.acceleration.predictors import Hold, Taylor
from lit_shortcut.acceleration.shortcut import Shortcut
from lit_shortcut.callbacks.plan_search import PlanSearch
from lit_shortcut.callbacks.replay_table import ReplayTable
from lit_shortcut.evaluation.rows import NamedPlan, RowEntry
from lit_shortcut.tasks.shortcut import ShortcutTask
from lit_shortcut.weights import WeightsError
from tests.acceleration.recorded import network
from tests.command_line import TOY, lightning, record_toy
from tests.tiny_trajectories import write_set

QUIET: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_set(tmp_path / "set", num_samples=30)
    return tmp_path


def validate(folder: Path, *callbacks: L.Callback, **strategy: Any) -> dict[str, float]:
    trainer = L.Trainer(**QUIET, callbacks=list(callbacks), **strategy)
    data = TrajectoryDataModule(str(folder / "set"), validation_shards=9, validation_batch_size=4)
    trainer.validate(ShortcutTask(network()), datamodule=data, verbose=False)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def test_table_shows_each_method_at_each_budget(folder: Path) -> None:
    logged = validate(folder, ReplayTable([1, 2, 4]))
    names = ("shortcut", "hold", "taylor_1", "taylor_2")
    found = {name: [logged[f"val/kl/{name}_n4_b{budget}"] for budget in (1, 2, 4)] for name in names}
    assert {values[2] for values in found.values()} == {0}
    assert found["hold"][0] == found["taylor_1"][0] > found["hold"][1] > 0


def test_table_of_two_ranks_is_that_of_one(folder: Path) -> None:
    one = validate(folder, ReplayTable([1, 2]))
    two = validate(folder, ReplayTable([1, 2]), strategy="ddp_fork", devices=2)
    assert two == pytest.approx(one, rel=1e-4)


def test_written_plan_is_at_least_as_good_as_the_even_one_in_the_table(folder: Path) -> None:
    path = folder / "plan.json"
    validate(folder, PlanSearch(path, [1, 2, 3], adaptive="sample"))
    (schedule,) = PlanFile.read(path).schedules
    assert schedule.trajectories == 27
    plans: dict[str, NamedPlan] = {
        "calibrated": partial(Calibrated, path=path),
        "adaptive": partial(CalibratedAdaptive, path=path),
    }
    rows: list[RowEntry] = [(4, 2, "shortcut", "calibrated"), (4, 2, "shortcut", "adaptive")]
    logged = validate(folder, ReplayTable([2], methods={}, rows=rows, plans=plans))
    calibrated, even = (logged[f"val/kl/shortcut_n4_b2{plan}"] for plan in ("_calibrated", ""))
    assert calibrated == pytest.approx(schedule.kl["2"], rel=1e-4)
    assert calibrated <= even + 1e-4
    assert schedule.mean_full_steps["2"] == pytest.approx(2, abs=0.25)
    assert logged["val/kl/shortcut_n4_b2_adaptive"] > 0


def test_features_that_do_not_change_get_no_threshold(folder: Path) -> None:
    validate(folder, PlanSearch(folder / "plan.json", [2], predictor=Hold()))
    (schedule,) = PlanFile.read(folder / "plan.json").schedules
    assert schedule.adaptive == {}


@pytest.mark.parametrize("budgets", [[0], [2, 4], []])
def test_budgets_out_of_range_are_refused(folder: Path, budgets: list[int]) -> None:
    with pytest.raises(ValueError, match="budgets"):
        validate(folder, PlanSearch(folder / "plan.json", budgets))


def test_plans_that_would_name_cast_weights_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"bf16-true casts the weights.*32-true or bf16-mixed"):
        validate(folder, PlanSearch(folder / "plan.json", [2]), precision="bf16-true")
    assert not (folder / "plan.json").exists()


def test_adaptive_plan_that_a_predictor_rules_out_is_refused_before_the_search(folder: Path) -> None:
    search = PlanSearch(folder / "plan.json", [2], Taylor(1), adaptive="sample")
    with pytest.raises(ValueError, match=r"Taylor has memory 2; use per: batch"):
        validate(folder, search)
    assert search._segments is None


def test_method_for_another_base_is_refused_before_anything_is_trained(folder: Path) -> None:
    save(folder / "linear.safetensors", torch.ones(4, 4, 4).double(), "another")
    table = ReplayTable([2], methods={"linear": Linear(folder / "linear.safetensors")})
    trainer = L.Trainer(**QUIET, max_steps=1, enable_checkpointing=False, callbacks=[table])
    with pytest.raises(WeightsError, match=r"linear_n4_b2: .*fitted on base another"):
        trainer.fit(ShortcutTask(network()), datamodule=TrajectoryDataModule(str(folder / "set")))
    assert trainer.global_step == 0


def test_file_that_cannot_be_added_to_is_refused_before_the_search(folder: Path) -> None:
    (folder / "plan.json").write_text("[]")
    search = PlanSearch(folder / "plan.json", [2])
    with pytest.raises(ValueError, match=r"plan\.json: expected a file of calibrated plans"):
        validate(folder, search)
    assert search._segments is None


@pytest.mark.parametrize(
    ("table", "named"),
    [
        (ReplayTable([5]), r"1\.\.4"),
        (ReplayTable([2], rows=[(3, 2, "hold")]), "hold_n3_b2"),
        (ReplayTable([2], rows=[(4, 3, "hold", {"guidance": 1})]), "hold_n4_b3_guidance1"),
        (ReplayTable([2], rows=[(4, 2, "unheard_of")]), "unheard_of"),
    ],
)
def test_row_that_cannot_be_replayed_is_refused(folder: Path, table: ReplayTable, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        validate(folder, table)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # calibrating leaves out fit's callbacks
def test_command_searches_plans_of_a_trained_shortcut(tmp_path: Path) -> None:
    record_toy(tmp_path)
    lightning(tmp_path, "fit", "--config", TOY / "fit.yaml", "--trainer.logger=false")
    checkpoint = "runs/toy/shortcut/last.ckpt"
    configs = ("--config", TOY / "fit.yaml", "--config", TOY / "calibrate.yaml")
    lightning(tmp_path, "validate", *configs, "--ckpt_path", checkpoint, "--trainer.logger=false")
    content = json.loads((tmp_path / "runs/toy/shortcut/plan.json").read_text())
    exported = Shortcut.load(tmp_path / "runs/toy/shortcut/shortcut.safetensors")
    assert content["predictor"] == exported.identity()
    assert set(content["schedules"][0]["steps"]) == {"2", "3"}
