from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from datamodules.conditions import ClassLabels
from lit_shortcut.acceleration.calibrated import Calibrated, PlanFile, SearchedSteps
from lit_shortcut.acceleration.origin import Origin
from lit_shortcut.acceleration.plans import Adaptive
from lit_shortcut.acceleration.predictors import Hold, Taylor
from lit_shortcut.acceleration.shortcut import Shortcut
from lit_shortcut.bases.toy import ToyBase
from lit_shortcut.contracts import Conditions, MaskedImageModel
from lit_shortcut.decoding.schedules import tokens_per_step
from lit_shortcut.evaluation.drawing import Drawn, draw_row
from lit_shortcut.evaluation.rows import Row, build_rows, vanilla_row
from lit_shortcut.fashion.classifier import FashionCNN
from lit_shortcut.metrics.images import ClassAgreement
from lit_shortcut.networks.shortcut import ShortcutNet
from lit_shortcut.sampling import Decoding
from lit_shortcut.tasks.evaluation import EvaluationTask
from lit_shortcut.weights import WeightsError
from tests.metrics.brightness import Brightness
from tests.metrics.difference import Difference

DECODING = Decoding(num_steps=5)
ROWS: list[Any] = [[5], [3], [5, 2, "hold"]]
NAMES = ["vanilla_n5", "vanilla_n3", "hold_n5_b2"]
TASK = "lit_shortcut.tasks.evaluation"


def measure(folder: Path, rows: list[Any] = ROWS, *, data: dict[str, Any] | None = None, **arguments: Any) -> Any:
    names = ("strategy", "devices", "limit_test_batches", "fast_dev_run", "precision", "callbacks")
    trainer = {name: arguments.pop(name) for name in names if name in arguments}
    settings = {"metrics": {"brightness": Brightness()}, "latency_rounds": 0, "results": folder, "grid_images": 3}
    settings |= {"methods": {"hold": Hold()}, "decoding": DECODING}
    task = EvaluationTask(arguments.pop("base", ToyBase()), rows=rows, **(settings | arguments))
    quiet: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    run = L.Trainer(**quiet, **trainer)
    run.test(task, datamodule=ClassLabels(**({"num_images": 10, "batch_size": 4} | (data or {}))), verbose=False)
    return task


def stored(folder: Path) -> dict[str, Any]:
    return {path.stem: json.loads(path.read_text()) for path in sorted((folder / "rows").iterdir())}


def brightness(row: Row, seed: int, num_images: int = 10) -> float:
    """By hand, all images in one batch."""
    (conditions,) = ClassLabels(num_images, batch_size=num_images, seed=seed).loader()
    return float(draw_row(ToyBase(), conditions, row).images.float().mean())


class Interrupt:
    """``draw`` that fails at its ``last`` call, and notes the rows it drew."""

    def __init__(self, last: int) -> None:
        self.last, self.drawn = last, list[str]()

    def __call__(self, base: MaskedImageModel, conditions: Conditions, row: Row) -> Drawn:
        self.drawn.append(row.name)
        if len(self.drawn) == self.last:
            raise RuntimeError("interrupted")
        return draw_row(base, conditions, row)


# ---- measuring


def test_stored_values_are_those_of_all_images_of_each_row_and_seed(tmp_path: Path) -> None:
    measure(tmp_path, data={"run_seeds": [0, 7]})
    found = stored(tmp_path)
    assert found.keys() == {f"{name}_seed{seed}" for name in NAMES for seed in (0, 7)}
    for row in build_rows(ROWS, DECODING, {"hold": Hold()}):
        for seed in (0, 7):
            values = found[f"{row.name}_seed{seed}"]["values"]
            assert values == {"brightness": pytest.approx(brightness(row, seed), rel=1e-5)}
        assert found[f"{row.name}_seed0"]["values"] != found[f"{row.name}_seed7"]["values"]
    assert not (tmp_path / "latency.json").exists()
    assert list((tmp_path / "unfinished").iterdir()) == []


PAIRED = {"brightness": Brightness(), "difference": Difference()}


def test_paired_metrics_compare_with_vanilla_of_the_same_seeds_wherever_it_stands(tmp_path: Path) -> None:
    rows = [[5, 2, "hold"], [3], [5]]
    measure(tmp_path, rows, metrics=PAIRED, data={"run_seeds": [0, 7]})
    found = stored(tmp_path)
    for row in build_rows(rows, DECODING, {"hold": Hold()}):
        for seed in (0, 7):
            (conditions,) = ClassLabels(10, batch_size=10, seed=seed).loader()
            own, vanilla = (
                draw_row(ToyBase(), conditions, each).images.float() for each in (row, vanilla_row(DECODING))
            )
            expected = float((own - vanilla).abs().mean())
            assert found[f"{row.name}_seed{seed}"]["values"]["difference"] == pytest.approx(expected, rel=1e-5)
            assert (expected == 0) == (row.name == "vanilla_n5")


@pytest.mark.parametrize("last", [2, 6, 9])
def test_interrupted_paired_test_draws_no_batch_twice_and_ends_with_the_same_bytes(
    tmp_path: Path, last: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure(tmp_path / "whole", metrics=PAIRED)
    monkeypatch.setattr(f"{TASK}.draw_row", interrupted := Interrupt(last))
    with pytest.raises(RuntimeError, match="interrupted"):
        measure(tmp_path / "killed", metrics=PAIRED)
    monkeypatch.setattr(f"{TASK}.draw_row", rest := Interrupt(0))
    measure(tmp_path / "killed", metrics=PAIRED)
    assert interrupted.drawn[:-1] + rest.drawn == NAMES * 3
    assert stored(tmp_path / "killed") == stored(tmp_path / "whole")


def test_row_added_later_is_compared_with_what_vanilla_drew_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure(tmp_path / "whole", metrics=PAIRED)
    measure(tmp_path / "later", ROWS[:2], metrics=PAIRED)
    monkeypatch.setattr(f"{TASK}.draw_row", later := Interrupt(0))
    measure(tmp_path / "later", metrics=PAIRED)
    assert later.drawn == ["hold_n5_b2"] * 3
    assert stored(tmp_path / "later") == stored(tmp_path / "whole")


def test_damaged_originals_are_drawn_again_and_the_log_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure(tmp_path / "whole", metrics=PAIRED)
    measure(tmp_path / "later", ROWS[:2], metrics=PAIRED)
    damaged = tmp_path / "later/originals/seed0_rank0/batch000001.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-9])
    said: list[str] = []
    monkeypatch.setattr("lit_shortcut.evaluation.originals.rank_zero_info", said.append)
    monkeypatch.setattr(f"{TASK}.draw_row", later := Interrupt(0))
    measure(tmp_path / "later", metrics=PAIRED)
    assert later.drawn == ["hold_n5_b2", "vanilla_n5", "hold_n5_b2", "hold_n5_b2"]
    assert str(damaged) in said[0]
    assert stored(tmp_path / "later") == stored(tmp_path / "whole")


def test_paired_rows_are_measured_again_when_vanilla_is_decoded_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, same = [[5], [3]], {"num_images": 10, "batch_size": 10}
    measure(tmp_path, rows, metrics=PAIRED, data=same)
    monkeypatch.setattr(f"{TASK}.draw_row", again := Interrupt(0))
    measure(tmp_path, rows, metrics=PAIRED, data=same, decoding=replace(DECODING, num_steps=3))
    assert again.drawn == ["vanilla_n3", "vanilla_n5"]
    assert stored(tmp_path)["vanilla_n3_seed0"]["values"]["difference"] == 0


@pytest.mark.parametrize("last", [2, 6, 9])
def test_interrupted_test_loses_no_finished_batch_and_ends_with_the_same_bytes(
    tmp_path: Path, last: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure(tmp_path / "whole")
    interrupted = Interrupt(last)
    monkeypatch.setattr(f"{TASK}.draw_row", interrupted)
    with pytest.raises(RuntimeError, match="interrupted"):
        measure(tmp_path / "killed")
    rest = Interrupt(0)
    monkeypatch.setattr(f"{TASK}.draw_row", rest)
    measure(tmp_path / "killed")
    assert interrupted.drawn[:-1] + rest.drawn == NAMES * 3  # three batches, each once for each row
    for path in (tmp_path / "whole").rglob("*"):
        if path.is_file():
            assert (tmp_path / "killed" / path.relative_to(tmp_path / "whole")).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    "change",
    [
        {"data": {"num_images": 12}},
        {"data": {"num_classes": 9}},
        {"base": ToyBase(seed=1)},
        {"metrics": {"other": Brightness()}},
        {"precision": "bf16-true"},
        {"compiled": True},
    ],
    ids=["number of images", "number of classes", "base", "metrics", "precision", "compiled"],
)
def test_change_of_what_values_depend_on_measures_every_row_again(
    tmp_path: Path, change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_shortcut.tasks.comparison.compile_networks", lambda base, *_: None)
    measure(tmp_path)
    monkeypatch.setattr(f"{TASK}.draw_row", again := Interrupt(0))
    measure(tmp_path)
    assert again.drawn == []
    measure(tmp_path, **change)
    assert Counter(again.drawn) == dict.fromkeys(NAMES, 3)


def test_other_weights_under_one_metrics_name_measure_again_and_the_log_says_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def classifier(seed: int) -> ClassAgreement:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return ClassAgreement(FashionCNN(width=2))

    said: list[str] = []
    monkeypatch.setattr("lit_shortcut.evaluation.results.rank_zero_info", said.append)
    measure(tmp_path, metrics={"agreement": classifier(0)})
    measure(tmp_path, metrics={"agreement": classifier(1)})
    measure(tmp_path / "fresh", metrics={"agreement": classifier(1)})
    assert stored(tmp_path) == stored(tmp_path / "fresh")
    assert len(said) == len(NAMES)
    assert all("metrics.agreement.classifier.weights was" in line for line in said)


def test_batch_size_changes_nothing_that_is_stored(tmp_path: Path) -> None:
    measure(tmp_path / "four")
    measure(tmp_path / "ten", data={"batch_size": 10})
    four, ten = stored(tmp_path / "four"), stored(tmp_path / "ten")
    assert {name: entry["identity"] for name, entry in four.items()} == {n: e["identity"] for n, e in ten.items()}
    for name, entry in four.items():
        assert entry["values"] == pytest.approx(ten[name]["values"], rel=1e-5)


def test_rows_whose_steps_depend_on_the_batch_are_measured_again_at_another_batch_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [[5], [5, 2, "taylor", "adaptive"]]
    asked: dict[str, Any] = {"plans": {"adaptive": Adaptive(threshold=0.5)}, "methods": {"taylor": Taylor(1)}}
    measure(tmp_path, rows, **asked)
    drawn = Interrupt(last=0)
    monkeypatch.setattr("lit_shortcut.tasks.evaluation.draw_row", drawn)
    measure(tmp_path, rows, data={"batch_size": 10}, **asked)
    assert set(drawn.drawn) == {"taylor_n5_b2_adaptive"}


def test_two_ranks_store_what_one_stores(tmp_path: Path) -> None:
    measure(tmp_path / "one", data={"run_seeds": [0, 1]})
    measure(tmp_path / "two", data={"run_seeds": [0, 1]}, strategy="ddp_fork", devices=2)
    one, two = stored(tmp_path / "one"), stored(tmp_path / "two")
    assert one.keys() == two.keys()
    assert list((tmp_path / "two" / "unfinished").iterdir()) == []
    for name, entry in one.items():
        assert entry["identity"] == two[name]["identity"]
        assert entry["full_steps"] == two[name]["full_steps"]
        assert entry["values"] == pytest.approx(two[name]["values"], rel=1e-5)


def test_passes_of_an_adaptive_plan_are_those_that_were_run(tmp_path: Path) -> None:
    plans = {"adaptive": Adaptive(threshold=0.5, per="batch")}
    rows = [[5], [5, 2, "taylor", "adaptive"], [5, 2, "taylor"]]
    measure(tmp_path, rows, plans=plans, methods={"taylor": Taylor(1)})
    found = {name: entry["full_steps"] for name, entry in stored(tmp_path).items()}
    assert found["vanilla_n5_seed0"] == {"mean": 5.0, "low": 5, "high": 5}
    assert found["taylor_n5_b2_seed0"] == {"mean": 2.0, "low": 2, "high": 2}
    (row,) = build_rows(rows[1:2], DECODING, {"taylor": Taylor(1)}, plans)
    batches = ClassLabels(10, batch_size=4).loader()
    counted = torch.cat([draw_row(ToyBase(), batch, row).full_steps for batch in batches]).float()
    assert found["taylor_n5_b2_adaptive_seed0"]["mean"] == pytest.approx(float(counted.mean()))


def test_rows_unlike_the_trajectories_of_their_shortcut_are_named_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("lit_shortcut.evaluation.identity.rank_zero_info", said.append)
    origin = Origin(num_steps=5, decoding={"num_steps": 5, "temperature": 0.9})
    shortcut = Shortcut(ShortcutNet(ToyBase().spec.width, num_heads=1), origin=origin)
    rows = [[5], [5, 2, "it", {"temperature": 0.9}], [5, 2, "it"], [6, 2, "it"]]
    measure(tmp_path, rows, methods={"it": shortcut})
    unlike = "not drawn as its shortcut's trajectories were: "
    assert said == [
        f"it_n5_b2: {unlike}temperature was 0.9 and is 1.0",
        f"it_n6_b2: {unlike}num_steps was 5 and is 6; temperature was 0.9 and is 1.0",
    ]


def test_calibrated_plan_is_read_from_its_file_and_checked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shortcut, asked = Shortcut(ShortcutNet(width=16, num_heads=2)), list[str]()
    counts = tokens_per_step("arccos", 5, 16)
    schedule = SearchedSteps(counts=counts, trajectories=1, steps={"2": [0, 1]}, kl={"2": 1.0})
    PlanFile(shortcut.identity(), ToyBase().fingerprint, [schedule]).write(tmp_path / "plan.json")
    identity = shortcut.identity
    monkeypatch.setattr(shortcut, "identity", lambda: asked.append("hash") or identity())
    rows = [[5], [5, 2, "shortcut"], [5, 2, "shortcut", "calibrated"]]
    plans = {"calibrated": partial(Calibrated, path=tmp_path / "plan.json")}
    measure(tmp_path, rows, plans=plans, methods={"shortcut": shortcut}, precision="bf16-true")
    found = stored(tmp_path)
    even, calibrated = (found[f"shortcut_n5_b2{plan}_seed0"] for plan in ("", "_calibrated"))
    assert even["full_steps"] == calibrated["full_steps"]
    assert even["values"] != calibrated["values"]
    assert len(asked) == 3  # when the plan is checked, and for the identities of two rows: not at every batch


# ---- latency


def test_latency_of_all_rows_is_measured_together_and_kept_while_nothing_changes(tmp_path: Path) -> None:
    task = measure(tmp_path, latency_rounds=2, latency_batch_size=3)
    first = task.stored.latency()
    assert first["measured"].keys() == set(NAMES)
    assert {entry["batch_size"] for entry in first["measured"].values()} == {3}
    assert {entry["rounds"] for entry in first["measured"].values()} == {2}
    assert all(entry["passes"] > 0 and len(entry["round_ms"]) == 2 for entry in first["measured"].values())
    again = {"latency_rounds": 2, "latency_batch_size": 3}
    assert measure(tmp_path, **again).stored.latency() == first
    assert measure(tmp_path, metrics={"other": Brightness()}, **again).stored.latency() == first
    assert measure(tmp_path, ROWS[:2], **again).stored.latency()["measured"].keys() == set(NAMES[:2])


def test_random_weights_are_timed_once_and_draw_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: Any) -> Drawn:
        raise AssertionError("an image was drawn")

    monkeypatch.setattr(f"{TASK}.draw_row", never)
    first = measure(tmp_path, random_weights=True, latency_rounds=1).stored.latency()
    assert list(first["measured"]) == NAMES
    assert not (tmp_path / "rows").exists()
    monkeypatch.setattr(f"{TASK}.time_rows", never)
    assert measure(tmp_path, random_weights=True, latency_rounds=1).stored.latency() == first


def test_precision_reaches_the_shortcut_network_too(tmp_path: Path) -> None:
    shortcut = Shortcut(ShortcutNet(width=16, num_heads=2))
    rows = [[5], [5, 2, "shortcut"]]
    measure(tmp_path, rows, methods={"shortcut": shortcut}, precision="bf16-true")
    assert {parameter.dtype for parameter in shortcut.parameters()} == {torch.bfloat16}
    identity = stored(tmp_path)["shortcut_n5_b2_seed0"]["identity"]
    assert (identity["precision"], identity["dtype"]) == ("bf16-true", "bfloat16")
    before = (tmp_path / "rows" / "shortcut_n5_b2_seed0.json").stat().st_mtime_ns
    again = Shortcut(ShortcutNet(width=16, num_heads=2))
    again.network.load_state_dict(shortcut.network.state_dict())
    measure(tmp_path, rows, methods={"shortcut": again}, precision="bf16-true")
    assert (tmp_path / "rows" / "shortcut_n5_b2_seed0.json").stat().st_mtime_ns == before  # found finished


def test_networks_are_compiled_where_that_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[MaskedImageModel] = []
    monkeypatch.setattr("lit_shortcut.tasks.comparison.compile_networks", lambda base, *_: compiled.append(base))
    measure(tmp_path, ROWS[:1])
    assert compiled == []
    task = measure(tmp_path, ROWS[:1], compiled=True)
    assert compiled == [task.base]


# ---- trial runs


@pytest.mark.parametrize("limits", [{"limit_test_batches": 1}, {"limit_test_batches": 0.5}, {"fast_dev_run": True}])
def test_trial_run_leaves_results_as_they_are_and_says_so(
    tmp_path: Path, limits: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("lit_shortcut.trials.rank_zero_info", said.append)
    measure(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    measure(tmp_path, base=ToyBase(seed=1), latency_rounds=1, **limits)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert any("trial run" in line and str(tmp_path) in line for line in said)


def test_run_after_a_trial_of_the_same_task_keeps_its_results(tmp_path: Path) -> None:
    task = measure(tmp_path, limit_test_batches=1)
    assert not (tmp_path / "rows").exists()
    run = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    run.test(task, datamodule=ClassLabels(num_images=10, batch_size=4), verbose=False)
    assert {name.rsplit("_", 1)[0] for name in stored(tmp_path)} == set(NAMES)


# ---- refused before anything is run


def foreign() -> Shortcut:
    return Shortcut(ShortcutNet(width=16, num_heads=2), base_fingerprint="0123456789abcdef")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[5], [3], [3]], "vanilla_n3"),
        ([[3]], r"must hold vanilla_n5.*got \['vanilla_n3'\]"),
        ([], "must hold vanilla_n5"),
        ([[5], [5, 6, "hold"]], r"budget must lie in 1\.\.5.*got 6"),
        ([[5], [17]], r"num_steps must lie in 1\.\.16.*got 17"),
        ([[5], [5, 2, "foreign"]], "trained on trajectories of base 0123456789abcdef"),
    ],
)
def test_rows_that_cannot_be_run_are_refused_before_any_is(
    tmp_path: Path, rows: list[Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: Any) -> Drawn:
        raise AssertionError("something was run")

    monkeypatch.setattr(f"{TASK}.draw_row", never)
    with pytest.raises(ValueError, match=message) as caught:
        measure(tmp_path, rows, methods={"hold": Hold(), "foreign": foreign()})
    assert isinstance(caught.value, WeightsError) == ("trained" in message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"latency_rounds": -1},
        {"grid_images": -1},
        {"latency_batch_size": 0},
        {"latency_rounds": 0, "random_weights": True},
    ],
    ids=str,
)
def test_number_that_is_too_small_is_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        measure(tmp_path, **wrong)


def test_unknown_class_is_refused_before_any_row_is_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"class labels must lie in 0\.\.9; got \[10\]"):
        measure(tmp_path, data={"num_images": 12, "num_classes": 11})
    assert list(tmp_path.iterdir()) == []


def test_rank_without_conditions_is_refused_instead_of_waited_for(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="fewer batches than there are ranks"):
        measure(tmp_path, data={"batch_size": 10}, strategy="ddp_fork", devices=2)
