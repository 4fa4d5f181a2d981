"""The YAMLs of Halton-MaskGIT as they are, on tiny files of the published form."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from lit_shortcut.networks.shortcut import ShortcutNet
from lit_shortcut.sampling import Decoding
from lit_shortcut.trajectory import Card
from tests.command_line import CONFIGS, lightning
from tests.published_halton import WIDTH, make_release, shrink

HALTON = CONFIGS / "halton"
QUIET = ("--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_progress_bar=false")
FOUR_STEPS = ("--model.decoding.num_steps=4", "--model.rows=[[4], [4, 2, shortcut]]")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working directory with a release and what extract recorded and fit trained on it."""
    folder = tmp_path_factory.mktemp("halton")
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch, "large")
        make_release(folder, "large", 256)
        words = ["--model.decoding.num_steps=4", "--data.num_images=6", "--data.batch_size=2"]
        lightning(folder, "predict", "--config", HALTON / "extract.yaml", *QUIET, *published(), *words)
        words = ["--trainer.devices=1", "--trainer.strategy=auto", "--trainer.max_steps=3"]
        words += ["--trainer.limit_train_batches=3", "--trainer.limit_val_batches=1"]
        words += ["--data.validation_shards=1", "--data.num_workers=0", f"--model.network.init_args.width={WIDTH}"]
        words += ["--model.network.init_args.num_heads=2", "--trainer.callbacks"]
        words += [json.dumps(yaml.safe_load((HALTON / "fit.yaml").read_text())["trainer"]["callbacks"][-1:])]
        lightning(folder, "fit", "--config", HALTON / "fit.yaml", *QUIET, *words)
        yield folder


def published() -> list[str]:
    return ["--model.base.source=.", "--model.base.vq=.", "--model.base.resolution=256"]


def test_extract_records_the_published_base(folder: Path) -> None:
    card = Card.read(folder / "runs/halton/trajectories")
    assert (card.num_steps, card.branches, card.num_classes, card.spec["num_tokens"]) == (4, 2, 1000, 256)
    assert card.decoding["order"] == "halton"
    assert card.decoding["temperature_course"] == {"first": 1.0, "last": 1.0, "power": 1.0, "warmup": 1}


def test_fit_trains_on_them_and_evaluate_measures_the_shortcut(folder: Path) -> None:
    network = ShortcutNet.load(folder / "runs/halton/shortcut/model.safetensors")
    assert network.widen.weight.abs().max() > 0
    words = [*FOUR_STEPS, "--data.num_images=2", "--data.batch_size=2", "--model.latency_rounds=0"]
    words += ["--model.metrics=null", "--trainer.callbacks=null"]
    lightning(folder, "test", "--config", HALTON / "evaluate.yaml", *QUIET, *published(), *words)
    rows = {path.stem for path in (folder / "runs/halton/report/rows").iterdir()}
    assert rows == {"vanilla_n4_seed10", "shortcut_n4_b2_seed10"}


def test_latency_of_random_weights_needs_no_files(tmp_path: Path, folder: Path) -> None:
    predictor = yaml.safe_load((CONFIGS / "parts/halton_random_shortcut.yaml").read_text())
    predictor["init_args"]["network"]["init_args"] = {"width": WIDTH, "num_heads": 2}
    words = [*FOUR_STEPS, "--model.base.resolution=256", f"--model.methods={json.dumps({'shortcut': predictor})}"]
    lightning(tmp_path, "test", "--config", HALTON / "latency.yaml", *QUIET, *words)
    measured = json.loads((tmp_path / "runs/halton/latency/latency.json").read_text())
    assert measured["measured"].keys() == {"vanilla_n4", "shortcut_n4_b2"}


def test_decoding_is_that_of_the_published_sampler() -> None:
    decoding = Decoding.from_values(yaml.safe_load((CONFIGS / "parts/halton_decoding.yaml").read_text()))
    assert (decoding.num_steps, decoding.schedule, decoding.order) == (32, "arccos_left", "halton")
    assert [decoding.guidance_at(step) for step in (0, 31)] == [0.5, 0.5]
    assert [decoding.sharpness_at(step) for step in (0, 1, 31)] == [0.5, 1, 1]
