from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from datamodules.conditions import ClassLabels
from lit_shortcut.acceleration.accelerated import Planned, Vanilla
from lit_shortcut.acceleration.predictors import Hold
from lit_shortcut.acceleration.shortcut import Shortcut
from lit_shortcut.bases.toy import ToyBase
from lit_shortcut.callbacks.trajectory_writer import TrajectoryWriter
from lit_shortcut.contracts import Conditions, MaskedImageModel
from lit_shortcut.evaluation import Row, images_of
from lit_shortcut.networks.shortcut import ShortcutNet
from lit_shortcut.sampling import Decoding, sample
from lit_shortcut.tasks.generation import GenerationTask
from lit_shortcut.tasks.recording import record
from lit_shortcut.weights import WeightsError
from tests.metrics.brightness import Brightness

DECODING = Decoding(num_steps=5)
ROWS = [Row(5), Row(3), Row(5, Planned(2, Hold()))]


def measure(
    folder: Path, rows: list[Row] = ROWS, *, data: dict[str, Any] | None = None, **arguments: Any
) -> GenerationTask:
    names = ("strategy", "devices", "limit_test_batches", "precision")
    trainer = {name: arguments.pop(name) for name in names if name in arguments}
    settings = {"metrics": {"brightness": Brightness()}, "latency_rounds": 0, "results": folder, "grid_images": 3}
    task = GenerationTask(arguments.pop("base", ToyBase()), decoding=DECODING, rows=rows, **(settings | arguments))
    quiet: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    run = L.Trainer(**quiet, **trainer)
    run.test(task, datamodule=ClassLabels(**({"num_images": 10, "batch_size": 4} | (data or {}))), verbose=False)
    return task


def stored(folder: Path) -> dict[str, Any]:
    return {path.stem: json.loads(path.read_text()) for path in sorted((folder / "rows").iterdir())}


def brightness(row: Row, seed: int, num_images: int = 10) -> float:
    """By hand, all images in one batch."""
    (conditions,) = ClassLabels(num_images, batch_size=num_images, seed=seed).loader()
    return float(images_of(ToyBase(), conditions, DECODING, row).float().mean())


# ---- recording


@pytest.mark.parametrize("guidance", [0.0, 2.8])
def test_recorded_features_and_tokens_are_those_of_the_decoding_loop(base: MaskedImageModel, guidance: float) -> None:
    conditions = Conditions(torch.arange(3), torch.arange(3) + 5, torch.arange(3))
    decoding = Decoding(num_steps=5, guidance=guidance)
    recorded = record(base, conditions, decoding)
    steps = list(sample(base, conditions, decoding, Vanilla()))
    spec = base.spec
    assert recorded.features.shape == (3, 1 if guidance == 0 else 2, 5, spec.sequence_length, spec.width)
    assert recorded.conditions is conditions
    for index, step in enumerate(steps):
        assert torch.equal(recorded.features[:, :, index], step.features.transpose(0, 1))
        assert torch.equal(recorded.committed_at < index, step.state.tokens != spec.mask_id)
        is_known = recorded.committed_at <= index
        assert torch.equal(recorded.tokens.masked_fill(~is_known, spec.mask_id), step.tokens)


@pytest.mark.parametrize("compiled", [False, True])
def test_recording_is_compiled_where_that_is_asked_for(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    bases: list[MaskedImageModel] = []
    monkeypatch.setattr("lit_shortcut.tasks.generation.compile_networks", lambda base, *_: bases.append(base))
    task = GenerationTask(ToyBase(), decoding=DECODING, compiled=compiled)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    trainer.predict(task, datamodule=ClassLabels(4, batch_size=4))
    assert bases == [task.base] * compiled


# ---- measuring


def test_stored_values_are_those_of_all_images_of_each_row_and_seed(tmp_path: Path) -> None:
    measure(tmp_path, run_seeds=[0, 7])
    found = stored(tmp_path)
    assert found.keys() == {f"{row.name}_seed{seed}" for row in ROWS for seed in (0, 7)}
    for row in ROWS:
        for seed in (0, 7):
            values = found[f"{row.name}_seed{seed}"]["values"]
            assert values == {"brightness": pytest.approx(brightness(row, seed), rel=1e-5)}
        assert found[f"{row.name}_seed0"]["values"] != found[f"{row.name}_seed7"]["values"]
    assert not (tmp_path / "latency.json").exists()


def test_interrupted_test_goes_on_with_the_row_it_was_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    last_batch = 3 + 2  # the second of three batches of the second row

    def counted(base: MaskedImageModel, conditions: Conditions, decoding: Decoding, row: Row) -> Tensor:
        drawn.append(row.name)
        if len(drawn) == last_batch:
            raise RuntimeError("interrupted")
        return images_of(base, conditions, decoding, row)

    monkeypatch.setattr("lit_shortcut.tasks.generation.images_of", counted)
    with pytest.raises(RuntimeError, match="interrupted"):
        measure(tmp_path)
    assert list(stored(tmp_path)) == ["vanilla_n5_seed0"]
    drawn.clear()
    last_batch = 0
    measure(tmp_path)
    assert drawn == ["vanilla_n3"] * 3 + ["hold_n5_b2"] * 3
    for row in ROWS:
        value = stored(tmp_path)[f"{row.name}_seed0"]["values"]["brightness"]
        assert value == pytest.approx(brightness(row, 0), rel=1e-5)


@pytest.mark.parametrize(
    "change",
    [{"data": {"num_images": 12}}, {"base": ToyBase(seed=1)}, {"metrics": {"other": Brightness()}}],
    ids=["number of images", "base", "metrics"],
)
def test_row_measured_under_other_facts_is_measured_anew(tmp_path: Path, change: dict[str, Any]) -> None:
    measure(tmp_path)
    before = stored(tmp_path)
    measure(tmp_path, **change)
    after = stored(tmp_path)
    for name, entry in after.items():
        assert entry["facts"] != before[name]["facts"]


def test_batch_size_changes_nothing_that_is_stored(tmp_path: Path) -> None:
    measure(tmp_path / "four")
    measure(tmp_path / "ten", data={"batch_size": 10})
    four, ten = stored(tmp_path / "four"), stored(tmp_path / "ten")
    assert {name: entry["facts"] for name, entry in four.items()} == {n: entry["facts"] for n, entry in ten.items()}
    for name, entry in four.items():
        assert entry["values"] == pytest.approx(ten[name]["values"], rel=1e-5)


def test_two_ranks_store_what_one_stores(tmp_path: Path) -> None:
    measure(tmp_path / "one")
    measure(tmp_path / "two", strategy="ddp_fork", devices=2)
    one, two = stored(tmp_path / "one"), stored(tmp_path / "two")
    assert one.keys() == two.keys()
    for name, entry in one.items():
        assert entry["facts"] == two[name]["facts"]
        assert entry["values"] == pytest.approx(two[name]["values"], rel=1e-5)


def test_latency_of_all_rows_is_measured_together_and_kept_while_nothing_changes(tmp_path: Path) -> None:
    task = measure(tmp_path, latency_rounds=2, latency_batch_size=3)
    first = task.results.latency()
    assert first is not None
    assert first["measured"].keys() == {row.name for row in ROWS}
    assert {entry["batch_size"] for entry in first["measured"].values()} == {3}
    assert {entry["rounds"] for entry in first["measured"].values()} == {2}
    slow = first["measured"]["vanilla_n5"]["median_ms"]
    for entry in first["measured"].values():
        assert entry["speedup"] == pytest.approx(slow / entry["median_ms"])
    assert measure(tmp_path, latency_rounds=2, latency_batch_size=3).results.latency() == first
    changed = measure(tmp_path, ROWS[:2], latency_rounds=2, latency_batch_size=3).results.latency()
    assert changed is not None
    assert changed["measured"].keys() == {"vanilla_n5", "vanilla_n3"}


def test_precision_reaches_the_shortcut_network_too(tmp_path: Path) -> None:
    shortcut = Shortcut(ShortcutNet(width=16, num_heads=2))
    measure(tmp_path, [Row(5), Row(5, Planned(2, shortcut))], precision="bf16-true")
    assert {parameter.dtype for parameter in shortcut.parameters()} == {torch.bfloat16}
    facts = stored(tmp_path)["shortcut_n5_b2_seed0"]["facts"]
    assert facts["precision"] == "bf16-true"
    before = (tmp_path / "rows" / "shortcut_n5_b2_seed0.json").stat().st_mtime_ns
    again = Shortcut(ShortcutNet(width=16, num_heads=2))
    again.network.load_state_dict(shortcut.network.state_dict())
    measure(tmp_path, [Row(5), Row(5, Planned(2, again))], precision="bf16-true")
    assert (tmp_path / "rows" / "shortcut_n5_b2_seed0.json").stat().st_mtime_ns == before  # found finished


def test_random_weights_are_timed_once_and_draw_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: Any) -> Tensor:
        raise AssertionError("an image was drawn")

    monkeypatch.setattr("lit_shortcut.tasks.generation.images_of", never)
    first = measure(tmp_path, random_weights=True, latency_rounds=1).results.latency()
    assert first is not None
    assert list(first["measured"]) == [row.name for row in ROWS]
    assert not (tmp_path / "rows").exists()
    monkeypatch.setattr("lit_shortcut.tasks.generation.measure_latency", never)
    assert measure(tmp_path, random_weights=True, latency_rounds=1).results.latency() == first


def test_compiled_rows_are_not_taken_for_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[MaskedImageModel] = []
    monkeypatch.setattr("lit_shortcut.tasks.generation.compile_networks", lambda base, *_: compiled.append(base))
    measure(tmp_path, ROWS[:1])
    assert "compiled" not in stored(tmp_path)["vanilla_n5_seed0"]["facts"]
    assert compiled == []
    measure(tmp_path, ROWS[:1], compiled=True)
    assert stored(tmp_path)["vanilla_n5_seed0"]["facts"]["compiled"] is True
    assert len(compiled) == 1


def test_random_weights_without_latency_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="latency_rounds must be at least 1"):
        measure(tmp_path, random_weights=True, latency_rounds=0)


# ---- refused before anything is run


def foreign() -> Shortcut:
    return Shortcut(ShortcutNet(width=16, num_heads=2), base_fingerprint="0123456789abcdef")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([Row(5), Row(3), Row(3)], r"must differ.*'vanilla_n5', 'vanilla_n3', 'vanilla_n3'"),
        ([Row(3)], r"must hold vanilla_n5.*got \['vanilla_n3'\]"),
        ([], "must hold vanilla_n5"),
        ([Row(5), Row(5, Planned(6, Hold()))], r"budget must lie in 1\.\.5.*got 6"),
        ([Row(5), Row(5, Planned(0, Hold()))], r"budget must lie in 1\.\.5.*got 0"),
        ([Row(5), Row(17)], r"num_steps must lie in 1\.\.16.*got 17"),
        ([Row(5), Row(5, Planned(2, foreign()))], "trained on trajectories of base 0123456789abcdef"),
    ],
)
def test_rows_that_cannot_be_run_are_refused_before_any_is(
    tmp_path: Path, rows: list[Row], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: Any) -> Tensor:
        raise AssertionError("something was run")

    monkeypatch.setattr("lit_shortcut.tasks.generation.images_of", never)
    with pytest.raises(ValueError, match=message) as caught:
        measure(tmp_path, rows)
    assert isinstance(caught.value, WeightsError) == ("trained" in message)
    assert list(tmp_path.iterdir()) == []


def test_unknown_class_is_refused_before_anything_is_recorded(tmp_path: Path) -> None:
    writer = TrajectoryWriter(tmp_path / "set")
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[writer])
    with pytest.raises(ValueError, match=r"class labels must lie in 0\.\.9; got \[10\]"):
        trainer.predict(GenerationTask(ToyBase(), decoding=Decoding(5)), ClassLabels(11, batch_size=1, num_classes=11))
    assert not list((tmp_path / "set").glob("shard-*"))


def test_released_network_runs_in_the_dtype_asked_for() -> None:
    network = ShortcutNet(width=16, num_heads=1, grid=4)
    assert {weights.dtype for weights in Shortcut(network, dtype="bfloat16").parameters()} == {torch.bfloat16}


def test_unknown_class_is_refused_before_any_row_is_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"class labels must lie in 0\.\.9; got \[10\]"):
        measure(tmp_path, data={"num_images": 12, "num_classes": 11})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("limit", [1, 0.5])
def test_rows_of_fewer_images_than_they_claim_are_refused(tmp_path: Path, limit: float) -> None:
    with pytest.raises(ValueError, match="leave limit_test_batches"):
        measure(tmp_path, limit_test_batches=limit)


def test_rank_without_conditions_is_refused_instead_of_waited_for(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="fewer batches than there are ranks"):
        measure(tmp_path, data={"batch_size": 10}, strategy="ddp_fork", devices=2)
