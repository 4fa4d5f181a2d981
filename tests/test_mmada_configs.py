"""The YAMLs of MMaDA as they are, on a tiny checkpoint in the published form."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from lit_shortcut.networks.llada_shortcut import LLaDAShortcutNet
from lit_shortcut.sampling import Decoding
from lit_shortcut.trajectory import Card
from tests.command_line import CONFIGS, lightning
from tests.published_mmada import make_release, shrink

MMADA = CONFIGS / "mmada"
QUIET = ("--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_progress_bar=false")
FOUR_STEPS = ("--model.decoding.num_steps=4", "--model.rows=[[4], [4, 2, shortcut]]")
PROMPTS = ("--data.path=prompts.txt", "--data.num_images=3")
PUBLISHED = ("--model.base.source=release", "--model.base.vq=release/vq", "--model.base.size=64")
SIZES = {"width": 16, "num_heads": 2, "mlp_width": 24}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working directory with a release and what extract recorded and fit trained on it."""
    folder = tmp_path_factory.mktemp("mmada")
    (folder / "prompts.txt").write_text("a red cat\ntwo\nthree grey cats\n")
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        make_release(folder / "release")
        words = [*PUBLISHED, *PROMPTS, "--model.decoding.num_steps=4"]
        lightning(folder, "predict", "--config", MMADA / "extract.yaml", *QUIET, *words)
        words = ["--trainer.devices=1", "--trainer.strategy=auto", "--trainer.max_steps=3", "--data.num_workers=0"]
        words += ["--trainer.limit_train_batches=3", "--trainer.limit_val_batches=1", "--data.validation_shards=1"]
        words += ["--trainer.enable_model_summary=false"]
        words += [f"--model.network.init_args.{name}={value}" for name, value in SIZES.items()]
        words += ["--trainer.callbacks"]
        words += [json.dumps(yaml.safe_load((MMADA / "fit.yaml").read_text())["trainer"]["callbacks"][-1:])]
        lightning(folder, "fit", "--config", MMADA / "fit.yaml", *QUIET, *words)
        yield folder


def test_extract_records_the_published_base(folder: Path) -> None:
    card = Card.read(folder / "runs/mmada/trajectories")
    assert (card.num_steps, card.branches, card.num_classes, card.spec["num_tokens"]) == (4, 2, 3, 16)
    assert (card.decoding["schedule"], card.decoding["noise_course"]) == ("cosine_each", "product")


def test_fit_trains_on_them_and_evaluate_measures_the_shortcut(folder: Path) -> None:
    network = LLaDAShortcutNet.load(folder / "runs/mmada/shortcut/model.safetensors")
    assert network.widen.weight.abs().max() > 0
    words = [*FOUR_STEPS, *PUBLISHED, *PROMPTS, "--model.latency_rounds=0", "--model.metrics=null"]
    words += ["--trainer.callbacks=null"]
    lightning(folder, "test", "--config", MMADA / "evaluate.yaml", *QUIET, *words)
    rows = {path.stem for path in (folder / "runs/mmada/report/rows").iterdir()}
    assert rows == {"vanilla_n4_seed10", "shortcut_n4_b2_seed10"}


def test_latency_of_random_weights_needs_no_files(tmp_path: Path) -> None:
    (tmp_path / "configs").symlink_to(CONFIGS)
    predictor = yaml.safe_load((CONFIGS / "parts/mmada_random_shortcut.yaml").read_text())
    predictor["init_args"]["network"]["init_args"] = SIZES
    base = [f"--model.base.init_args.{name}={value}" for name, value in {**SIZES, "depth": 1, "size": 64}.items()]
    base[0] = "--model.base.init_args.feature_width=16"
    words = [*FOUR_STEPS, *base, f"--model.methods={json.dumps({'shortcut': predictor})}"]
    lightning(tmp_path, "test", "--config", MMADA / "latency.yaml", *QUIET, *words)
    measured = json.loads((tmp_path / "runs/mmada/latency/latency.json").read_text())
    assert measured["measured"].keys() == {"vanilla_n4", "shortcut_n4_b2"}


def test_decoding_is_that_of_the_published_sampler() -> None:
    decoding = Decoding(**yaml.safe_load((CONFIGS / "parts/mmada_decoding.yaml").read_text()))
    assert (decoding.num_steps, decoding.schedule, decoding.order) == (15, "cosine_each", "confidence")
    assert [decoding.guidance_at(step) for step in (0, 14)] == [3.5, 3.5]
    assert [round(decoding.noise_at(step), 3) for step in (0, 1, 2, 14)] == [0.933, 0.809, 0.647, 0]
