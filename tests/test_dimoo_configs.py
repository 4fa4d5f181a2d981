"""The YAMLs of Lumina-DiMOO as they are, but for a tiny checkpoint, small images and few steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from lit_shortcut.acceleration.shortcut import Shortcut
from lit_shortcut.bases.dimoo.published import published
from lit_shortcut.networks.llada_shortcut import NAMES, LLaDAShortcutNet
from lit_shortcut.published import save_published
from lit_shortcut.sampling import Decoding
from lit_shortcut.trajectory import Card
from lit_shortcut.trajectory.index import check_shards
from tests.command_line import CONFIGS, lightning
from tests.published_dimoo import SPECIAL, make_checkpoint

DIMOO = CONFIGS / "dimoo"
ROWS = '--model.rows=[[4], [4, 2, "shortcut"]]'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with checkpoint, released shortcut and prompts."""
    folder = tmp_path_factory.mktemp("dimoo")
    (folder / "checkpoint").mkdir()
    make_checkpoint(folder / "checkpoint")
    save_published(folder / "shortcut.pth", LLaDAShortcutNet(16, num_heads=2, mlp_width=24).bfloat16(), NAMES)
    (folder / "prompts.txt").write_text("a red cat\ntwo\nthree grey cats\n")
    return folder


def base_arguments(folder: Path) -> list[str]:
    special = json.dumps(vars(SPECIAL))
    source = f"--model.base.source={folder / 'checkpoint'}"
    return [source, "--model.base.height=32", "--model.base.width=48", f"--model.base.special={special}"]


def run(folder: Path, verb: str, config: str, *words: str) -> None:
    tiny = ("--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_progress_bar=false")
    prompts = ("--data.path=prompts.txt", "--data.num_images=3")
    lightning(folder, verb, "--config", DIMOO / config, *tiny, *prompts, *base_arguments(folder), *words)


def test_extract_records_a_shard_for_each_prompt(folder: Path) -> None:
    run(folder, "predict", "extract.yaml", "--model.decoding.num_steps=4")
    card = Card.read(folder / "runs/dimoo/trajectories")
    check_shards(folder / "runs/dimoo/trajectories", card)
    assert (card.num_shards, card.spec["num_tokens"], card.num_steps) == (3, 6, 4)
    base = published(str(folder / "checkpoint"), height=32, width=48, special=SPECIAL)
    assert card.base_fingerprint == base.fingerprint


def test_fit_trains_on_what_extract_records_and_samples_with_it(folder: Path) -> None:
    run(folder, "predict", "extract.yaml", "--model.decoding.num_steps=4")
    fit = yaml.safe_load((DIMOO / "fit.yaml").read_text().replace("../parts", str(CONFIGS / "parts")))
    fit["trainer"] |= {"devices": 1, "strategy": "auto", "max_epochs": 1, "limit_train_batches": 2, "logger": False}
    table, sampling = (
        one["init_args"]
        for one in fit["trainer"]["callbacks"]
        if one["class_path"].endswith(("ReplayTable", "AcceleratedSampling"))
    )
    table["budgets"] = [2]
    source = {"source": "checkpoint", "height": 32, "width": 48, "special": vars(SPECIAL)}
    sampling["base"] = {"class_path": "lit_shortcut.bases.dimoo.published.published", "init_args": source}
    sampling["rows"], sampling["decoding"] = [[4, 2, "shortcut"]], {"num_steps": 4, "schedule": "cosine_left"}
    sampling["conditions"]["init_args"] |= {"path": "prompts.txt", "num_images": 2}
    fit["model"]["init_args"]["network"]["init_args"] |= {"width": 16, "num_heads": 2, "mlp_width": 24}
    fit["data"]["init_args"]["validation_shards"] = 1
    (folder / "fit.yaml").write_text(yaml.safe_dump(fit))
    quiet = ("--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false")
    lightning(folder, "fit", "--config", folder / "fit.yaml", *quiet)
    assert Shortcut.load(folder / "runs/dimoo/shortcut").network.hparams["width"] == 16


def test_evaluate_measures_the_released_shortcut_in_half_precision(folder: Path) -> None:
    arguments = yaml.safe_load((DIMOO / "evaluate.yaml").read_text())["model"]["init_args"]
    assert [row[1] for row in arguments["rows"] if len(row) > 1] == [14, 11, 9, 14, 14]
    methods = {"shortcut": arguments["methods"]["shortcut"]}
    methods["shortcut"]["init_args"]["network"]["init_args"] = {"path": "shortcut.pth", "num_heads": 2}
    clip = {"class_path": "lit_shortcut.metrics.clip.CLIPScore", "init_args": {"model": str(CLIP)}}
    words = (ROWS, f"--model.methods={json.dumps(methods)}", "--model.decoding.num_steps=4", "--model.latency_rounds=1")
    words += (f"--model.metrics={json.dumps({'clip_score': clip})}",)
    run(folder, "test", "evaluate.yaml", *words)
    found = {path.stem for path in (folder / "runs/dimoo/report/rows").iterdir()}
    assert found == {"vanilla_n4_seed10", "shortcut_n4_b2_seed10"}
    assert "| clip_score" in (folder / "runs/dimoo/report/report.md").read_text()


def test_decoding_is_that_of_the_published_sampler() -> None:
    decoding = Decoding(**yaml.safe_load((CONFIGS / "parts/dimoo_decoding.yaml").read_text()))
    assert decoding.num_steps == 64
    assert [decoding.guidance_at(step) for step in (0, 63)] == [4, 4]
    assert [decoding.noise_at(step) for step in (0, 63)] == [1, 1]


# ---- published sizes without weights, but for narrow networks and small images

CLIP = CONFIGS.parent / "checkpoints" / "fashion_text" / "clip"
SMALL = ("height=64", "width=64", "feature_width=64", "num_heads=2", "mlp_width=32")
PREDICTOR = {"width": 64, "num_heads": 2, "mlp_width": 32}


def run_random(folder: Path, config: str, *words: str) -> None:
    (folder / "configs").symlink_to(CONFIGS)
    cpu = ("--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_progress_bar=false")
    small = [f"--model.base.init_args.{size}" for size in SMALL]
    lightning(folder, "test", "--config", DIMOO / config, *cpu, *small, *words)


def test_latency_of_random_weights_needs_no_files(tmp_path: Path) -> None:
    rows = yaml.safe_load((DIMOO / "latency.yaml").read_text())["model"]["init_args"]["rows"]
    assert rows == [[64], *([64, budget, "shortcut"] for budget in (14, 11, 9))]
    predictor = yaml.safe_load((CONFIGS / "parts/dimoo_random_shortcut.yaml").read_text())
    predictor["init_args"]["network"]["init_args"] = PREDICTOR
    words = (ROWS, f"--model.methods={json.dumps({'shortcut': predictor})}")
    words += ("--model.decoding.num_steps=4", "--model.base.init_args.depth=1")
    run_random(tmp_path, "latency.yaml", *words)
    measured = json.loads((tmp_path / "runs/dimoo/latency/latency.json").read_text())
    assert measured["measured"].keys() == {"vanilla_n4", "shortcut_n4_b2"}
    loops = measured["identity"]["rows"].values()
    assert all(loop["base"]["fingerprint"].startswith("random-") for loop in loops)
