"""The YAMLs of aMUSEd and Meissonic as they are, but for a tiny checkpoint, small images and few steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_shortcut.networks.shortcut import ShortcutNet
from lit_shortcut.trajectory import Card, problems
from lit_shortcut.trajectory.interface_file import load_interface
from tests import published_amused, published_meissonic
from tests.command_line import CONFIGS, lightning

SHORTCUTS = {  # arguments beside those of the YAML
    "amused": {"width": 32, "num_heads": 2, "grid": 4},
    "meissonic": {"width": 24, "num_heads": 2, "grid": 4},
}
ROWS_OF_FEATURES = {"amused": 16, "meissonic": 4}
QUIET = ("--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.logger=false")


def base_words(folder: Path) -> list[str]:
    init = "--model.base.init_args"
    own_text = [f"{init}.text_encoder={folder / 'checkpoint/text_encoder'}"] if "meissonic" in folder.name else []
    sizes = (f"{init}.{side}=64" for side in ("height", "width"))
    return [f"{init}.source={folder / 'checkpoint'}", *own_text, *sizes, f"{init}.negative=bad"]


@pytest.fixture(scope="module", params=SHORTCUTS)
def name(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def folder(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a checkpoint, prompts, and what extract and fit make of them."""
    folder = tmp_path_factory.mktemp(name)
    if name == "amused":
        published_amused.write_folder(folder / "checkpoint")
    else:
        published_meissonic.write_folder(folder / "checkpoint", downsample=True, upsample=True)
    (folder / "prompts.txt").write_text("a red cat\ntwo\nthree cats\nfour\n")
    prompts = ("--data.path=prompts.txt", "--data.num_images=4", "--data.batch_size=2")
    words = (*QUIET, *prompts, *base_words(folder), "--model.decoding.num_steps=5")
    lightning(folder, "predict", "--config", CONFIGS / name / "extract.yaml", *words)
    trainer = (
        "--trainer.strategy=auto",
        "--trainer.max_epochs=-1",
        "--trainer.max_steps=3",
        "--trainer.precision=32-true",
    )
    callbacks: list[Any] = yaml.safe_load((CONFIGS / name / "fit.yaml").read_text())["trainer"]["callbacks"][-1:]
    network = (f"--model.network.init_args.{key}={value}" for key, value in SHORTCUTS[name].items())
    data = ("--data.validation_shards=1", "--data.num_workers=0", "--data.batch_size=2")
    chosen = ("--trainer.limit_train_batches=3", f"--trainer.callbacks={json.dumps(callbacks)}")
    lightning(folder, "fit", "--config", CONFIGS / name / "fit.yaml", *QUIET, *trainer, *chosen, *network, *data)
    return folder


def test_extract_records_the_published_base(folder: Path, name: str) -> None:
    source = folder / f"runs/{name}/trajectories"
    card = Card.read(source)
    assert not list(problems(source))
    assert card.decoding["schedule"] == "cosine_each"
    assert (card.num_steps, card.branches, card.spec["num_tokens"]) == (5, 2, 16)
    assert load_interface(source, card).num_rows == card.spec["sequence_length"] == ROWS_OF_FEATURES[name]


def test_fit_trains_on_them(folder: Path, name: str) -> None:
    network = ShortcutNet.load(folder / f"runs/{name}/shortcut/model.safetensors")
    assert network.widen.weight.abs().max() > 0
    assert network.neighbourhood is not None


def test_evaluate_draws_its_rows_with_the_shortcut_trained_here(folder: Path, name: str) -> None:
    num_steps, budget = 5, 2
    rows = f"--model.rows=[[{num_steps}], [{num_steps}, {budget}, shortcut], [{num_steps}, {budget}, hold]]"
    prompts = ("--data.path=prompts.txt", "--data.num_images=2", "--data.batch_size=2")
    nothing = ("--model.metrics=null", "--trainer.callbacks=null", "--model.latency_rounds=0")
    words = (*QUIET, *prompts, *nothing, *base_words(folder), f"--model.decoding.num_steps={num_steps}", rows)
    lightning(folder, "test", "--config", CONFIGS / name / "evaluate.yaml", *words)
    found = {path.name for path in (folder / f"runs/{name}/report/rows").iterdir()}
    assert found == {f"{row}_seed10.json" for row in ("vanilla_n5", "shortcut_n5_b2", "hold_n5_b2")}
