from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torchvision
import yaml

import lit_shortcut.tasks.evaluation
from lit_shortcut.acceleration.shortcut import Shortcut
from lit_shortcut.bases.toy import ToyBase
from lit_shortcut.evaluation.drawing import Drawn
from lit_shortcut.trajectory import Card
from lit_shortcut.trajectory.index import check_shards
from tests.command_line import CONFIGS, TOY, lightning
from tests.wandb_offline import Run, read_run

PARTS = sorted((CONFIGS / "parts").glob("*.yaml"))
YAMLS = sorted(set(CONFIGS.glob("**/*.yaml")) - set(PARTS))
ROWS = ["vanilla_n3", "vanilla_n6", "shortcut_n6_b2", "hold_n6_b2"]
SEEDS = [0, 1]


def relative(path: Path) -> str:
    return path.relative_to(CONFIGS.parent).as_posix()


def commands(path: Path) -> list[tuple[str, list[str]]]:
    """Verb and YAMLs of each command that the comment at the head of ``path`` names."""
    found = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        if command := re.match(r"# (?:lightning|lit-shortcut) (\w+)((?: --config \S+)+)", line):
            found.append((command[1], command[2].split()[1::2]))
    return found


@pytest.mark.parametrize("base", ["maskgit", "halton", "dimoo", "mmada", "amused", "meissonic"])
@pytest.mark.parametrize(
    ("name", "precision"),
    [("extract", "bf16-true"), ("evaluate", "bf16-true"), ("generate", "bf16-true"), ("fit", "bf16-mixed")],
)
def test_published_systems_state_their_precision(base: str, name: str, precision: str) -> None:
    assert yaml.safe_load((CONFIGS / base / f"{name}.yaml").read_text())["trainer"]["precision"] == precision


@pytest.mark.parametrize("path", YAMLS, ids=relative)
def test_yaml_parses_under_the_commands_it_names(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert commands(path), "no comment `# lightning VERB --config …` or `# lit-shortcut …` at its head"
    for verb, configs in commands(path):
        assert relative(path) in configs
        words = [word for config in configs for word in ("--config", CONFIGS.parent / config)]
        with pytest.raises(SystemExit) as stopped:
            lightning(tmp_path, verb, *words, "--print_config")
        assert stopped.value.code == 0
        printed = capsys.readouterr().out
        assert {"trainer", "model", "data"} <= yaml.safe_load(printed).keys()
        assert "parts/" not in printed  # every part was taken in, none for a mere string
        if verb == "fit":
            callbacks = yaml.safe_load(printed)["trainer"]["callbacks"]
            names = [callback["class_path"].rpartition(".")[2] for callback in callbacks]
            assert names.count("LastCheckpoint") == 1, "the same in all configurations, with intervals that fit the run"
            written = [callback["init_args"].get("filename") for callback in callbacks]
            assert "last" not in written


FITS = [configs for path in YAMLS for verb, configs in commands(path) if verb == "fit"]


@pytest.mark.parametrize("configs", FITS, ids=lambda configs: configs[-1])
def test_each_rank_of_fit_has_a_batch_to_sample(configs: list[str]) -> None:
    trainer: dict[str, Any] = {}
    for config in configs:
        trainer |= yaml.safe_load((CONFIGS.parent / config).read_text()).get("trainer", {})
    for callback in trainer["callbacks"]:
        if callback["class_path"].endswith(".AcceleratedSampling"):
            conditions = callback["init_args"]["conditions"]["init_args"]
            num_batches = ceil(conditions["num_images"] / conditions["batch_size"])
            assert num_batches >= trainer.get("devices", 1) * trainer.get("num_nodes", 1)


@pytest.mark.parametrize("base", ["fashion", "fashion_text"])
def test_command_that_a_report_says_to_run_next_draws_with_the_measured_shortcut(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (callback,) = yaml.safe_load((CONFIGS / base / "evaluate.yaml").read_text())["trainer"]["callbacks"]
    for folder in ("configs", "checkpoints"):
        (tmp_path / folder).symlink_to(CONFIGS.parent / folder)
    words = shlex.split(callback["init_args"]["then"].replace("{shortcut}", "runs/mine"))
    with pytest.raises(SystemExit) as stopped:
        lightning(tmp_path, *words, "--print_config")
    printed = capsys.readouterr()
    assert stopped.value.code == 0, printed.err
    shortcut = yaml.safe_load(printed.out)["model"]["init_args"]["shortcut"]
    assert shortcut["init_args"]["path"] == "runs/mine"


@pytest.mark.parametrize("path", PARTS, ids=relative)
def test_part_is_used(path: Path) -> None:
    assert any(f"parts/{path.name}" in other.read_text() for other in YAMLS)


class Toy(NamedTuple):
    """What the four verbs left behind."""

    folder: Path
    runs: dict[str, Run]
    rerecorded: set[Path]
    drawn: dict[str, Counter[str]]  # row names by the batches that each test run drew


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    folder = tmp_path_factory.mktemp("toy")
    runs: dict[str, Run] = {}
    drawn: dict[str, Counter[str]] = {}
    real_draw = lit_shortcut.tasks.evaluation.draw_row

    def run(name: str, verb: str, config: str, *words: object) -> None:
        before = set(folder.glob("runs/wandb/offline-run-*"))
        drawn[name] = Counter()

        def draw(*arguments: Any) -> Drawn:
            drawn[name][arguments[2].name] += 1
            return real_draw(*arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lit_shortcut.tasks.evaluation, "draw_row", draw)
            lightning(folder, verb, "--config", TOY / config, *words)
        for path in set(folder.glob("runs/wandb/offline-run-*")) - before:
            runs[name] = read_run(path)

    def times() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in folder.glob("runs/toy/trajectories/*")}

    run("predict", "predict", "extract.yaml")
    recorded = times()
    run("predict again", "predict", "extract.yaml")
    rerecorded = {path for path, time in times().items() if recorded.get(path) != time}
    run("fit", "fit", "fit.yaml")
    run("validate", "validate", "fit.yaml", "--ckpt_path", "runs/toy/shortcut/last.ckpt")
    run("test", "test", "evaluate.yaml")
    run("test again", "test", "evaluate.yaml")
    (folder / "runs/toy/report/rows/vanilla_n3_seed1.json").unlink()
    run("test without one row", "test", "evaluate.yaml")
    elsewhere = "--model.results=runs/toy/elsewhere"
    run("test elsewhere", "test", "evaluate.yaml", elsewhere, "--data.run_seeds=[0,1,2]")
    run("test of six", "test", "evaluate.yaml", elsewhere, "--data.num_images=6")
    return Toy(folder, runs, rerecorded, drawn)


def test_predict_records_the_whole_set_and_a_second_time_nothing(toy: Toy) -> None:
    card = Card.read(toy.folder / "runs/toy/trajectories")
    assert (card.num_samples, card.num_steps, card.base_fingerprint) == (12, 6, ToyBase().fingerprint)
    check_shards(toy.folder / "runs/toy/trajectories", card)
    assert toy.rerecorded == set()


def test_fit_exports_the_averaged_network_tied_to_its_base(toy: Toy) -> None:
    exported = Shortcut.load(toy.folder / "runs/toy/shortcut/shortcut.safetensors")
    checkpoint = Shortcut.load(toy.folder / "runs/toy/shortcut/last.ckpt")
    assert exported.identity() == checkpoint.identity()
    assert exported.base_fingerprint == checkpoint.base_fingerprint == ToyBase().fingerprint
    entry = yaml.safe_load((toy.folder / "runs/toy/shortcut/manifest.yaml").read_text())["shortcut.safetensors"]
    assert (entry["optimizer_steps"], entry["licence"]) == (8, "Apache-2.0")
    assert entry["metrics"]["val/mse"] == pytest.approx(toy.runs["fit"].series("val/mse")[7], abs=1e-6)


def test_validating_a_checkpoint_measures_what_fit_measured_last(toy: Toy) -> None:
    validated = toy.runs["validate"].history[-1]
    names = {name for name in validated if name.startswith("val/")}
    assert {"val/mse", "val/gain", "val/rollout_gain_3", "val/cosine_centred", "val/head_kl_gain"} <= names
    for name in names:
        assert validated[name] == pytest.approx(toy.runs["fit"].series(name)[7])


def test_wandb_run_of_fit_holds_the_configuration(toy: Toy) -> None:
    run = toy.runs["fit"]
    assert run.project == "lit-shortcut"
    config = run.config["config"]
    assert config["trainer"]["max_steps"] == 8
    assert config["model"]["init_args"]["network"]["init_args"]["width"] == 16
    assert yaml.safe_load((run.folder / "files/config_cli.yaml").read_text()) == config


def test_wandb_run_of_fit_holds_training_validation_and_sampling_over_optimiser_steps(toy: Toy) -> None:
    run = toy.runs["fit"]
    assert list(run.series("train/loss")) == list(range(8))
    measured = [
        f"sampling/{name}/{value}"
        for name in ("shortcut_n6_b2", "shortcut_n6_b3")
        for value in ("latency_ms", "speedup")
    ]
    for name in ["val/mse", "val/gain", *measured]:
        assert list(run.series(name)) == [3, 7]
    assert set(run.series("sampling/vanilla_n6/speedup").values()) == {1}
    slower = run.series("sampling/vanilla_n6/latency_ms")[7] / run.series("sampling/shortcut_n6_b2/latency_ms")[7]
    assert run.series("sampling/shortcut_n6_b2/speedup")[7] == pytest.approx(slower)
    for name, kept in {"val/mse": {"min"}, "val/gain": {"max"}, "sampling/*": {"last"}}.items():
        assert run.axes[name] == ("trainer/global_step", kept)


def test_wandb_run_of_fit_holds_an_image_grid_for_each_validation(toy: Toy) -> None:
    run = toy.runs["fit"]
    grids = [path for path in run.files if path.startswith("media/images/sampling/grid")]
    assert len(grids) == 2
    for path in grids:
        assert torchvision.io.read_image(str(run.folder / "files" / path)).shape[0] in (3, 4)


def test_wandb_run_of_test_holds_table_grids_and_pareto_plot(toy: Toy) -> None:
    run = toy.runs["test"]
    (table,) = (path for path in run.files if path.startswith("media/table/report/table"))
    content = json.loads((run.folder / "files" / table).read_text())
    assert [line[content["columns"].index("name")] for line in content["data"]] == ROWS
    for name in ("grids", "pareto"):
        assert any(path.startswith(f"media/images/report/{name}") for path in run.files)
    assert run.axes["pareto/*"].step == "pareto/latency_ms"
    points = [row for row in run.history if "pareto/latency_ms" in row]
    assert [next(name for name in row if name.endswith("class_agreement")) for row in points] == [
        f"pareto/{name.partition('_')[0]}/class_agreement" for name in ROWS
    ]


def test_artifacts_say_what_came_from_what(toy: Toy) -> None:
    weights = Shortcut.load(toy.folder / "runs/toy/shortcut/shortcut.safetensors").identity()["weights"]
    recorded = f"trajectories-{Card.read(toy.folder / 'runs/toy/trajectories').digest}"
    made = toy.runs["fit"].artifacts
    assert made[recorded] == {"card.json"}
    assert made[f"shortcut-{weights}"] == {"shortcut.safetensors"}
    assert toy.runs["fit"].config["uses"] == [recorded]
    assert toy.runs["test"].config["uses"] == [f"shortcut-{weights}"]
    assert toy.runs["test"].artifacts["report"] == {
        "report.md",
        "report.json",
        "grids.png",
        "pareto.png",
        "report.html",
    }


def test_test_stores_every_row_and_writes_the_report(toy: Toy) -> None:
    report = toy.folder / "runs/toy/report"
    stored = {path.stem for path in (report / "rows").iterdir()}
    assert stored == {f"{row}_seed{seed}" for row in ROWS for seed in SEEDS}
    entry = json.loads((report / "rows/shortcut_n6_b2_seed1.json").read_text())
    weights = Shortcut.load(toy.folder / "runs/toy/shortcut/shortcut.safetensors").identity()["weights"]
    assert entry["full_steps"]["mean"] == entry["row"]["budget"] == 2
    assert entry["identity"]["base"] == ToyBase().identity()
    assert entry["identity"]["acceleration"]["weights"] == weights
    assert entry["identity"]["conditions"]["num_images"] == 10
    text = (report / "report.md").read_text()
    for method, budget in (("vanilla", 6), ("shortcut", 2), ("hold", 2)):
        assert re.search(rf"\| {method} +\| 6 +\| {budget} ", text)
    assert "10 images per row and seed, 2 seed(s)" in text
    assert "Fewer than 5,000 images" in text
    for name in ("pareto.png", "grids.png"):
        assert torchvision.io.read_image(str(report / name)).float().std() > 1


def test_finished_rows_are_not_drawn_again(toy: Toy) -> None:
    assert toy.drawn["test"] == dict.fromkeys(ROWS, 3 * len(SEEDS))  # 10 images in batches of 4
    assert toy.drawn["test again"] == {}
    assert toy.drawn["test without one row"] == {"vanilla_n3": 3}


def test_change_of_the_number_of_images_measures_every_row_anew(toy: Toy) -> None:
    assert toy.drawn["test of six"] == dict.fromkeys(ROWS, 2 * len(SEEDS))
    text = (toy.folder / "runs/toy/elsewhere/report.md").read_text()
    # rows of the third run seed, still of ten images, lie in the folder but are of another run
    assert (toy.folder / "runs/toy/elsewhere/rows/vanilla_n3_seed2.json").exists()
    assert "6 images per row and seed, 2 seed(s)" in text
