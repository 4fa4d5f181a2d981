from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from datamodules.prompts import read_prompts
from lit_shortcut import load
from lit_shortcut.acceleration.shortcut import Shortcut
from lit_shortcut.bases.maskgit.transformer import MaskGITTransformer
from lit_shortcut.fashion.classifier import FashionFeatures
from lit_shortcut.inputs import SHIPPED, located, use_projects_of
from lit_shortcut.metrics.distances import FrechetDistance
from lit_shortcut.trajectory import Card
from tests.command_line import CONFIGS, lightning

BASE = "checkpoints/fashion/base.safetensors"
FEW = ("--data.num_images=4", "--data.batch_size=2")


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    use_projects_of([])


def written(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_current_folder_comes_before_the_project_and_this_before_what_is_shipped(tmp_path: Path) -> None:
    assert located(BASE) == SHIPPED / BASE
    theirs = written(tmp_path / "project" / BASE)
    use_projects_of([tmp_path / "project/configs/fashion/extract.yaml"])
    assert located(BASE) == theirs
    written(Path(BASE))
    assert located(BASE) == Path(BASE)


def test_yaml_outside_configs_has_its_inputs_beside_it(tmp_path: Path) -> None:
    theirs = written(tmp_path / "mine/prompts.txt")
    use_projects_of([tmp_path / "mine/extract.yaml"])
    assert located("prompts.txt") == theirs


def test_what_is_nowhere_and_absolute_paths_stay_what_they_are(tmp_path: Path) -> None:
    assert located("nowhere.txt") == Path("nowhere.txt")
    assert located(tmp_path / BASE) == tmp_path / BASE


def test_weights_shipped_with_the_package_load_from_any_folder() -> None:
    assert MaskGITTransformer.load(Path(BASE)).hparams["codebook_size"] == 64
    folder = Path("checkpoints/fashion")
    extractor = FashionFeatures.load(folder / "classifier.safetensors")
    assert FrechetDistance(extractor, folder / "reference.safetensors").reference["mean"].shape == (128,)
    assert len(read_prompts(Path("checkpoints/fashion_text/held_out_prompts.txt"))) == 2000
    assert Shortcut.load(folder / "shortcut").folder == SHIPPED / folder / "shortcut"
    assert load("checkpoints/fashion_text", budget=1)(["a coat"]).full_steps.tolist() == [1]


def test_yaml_of_another_folder_takes_inputs_of_its_project_and_leaves_outputs_here(tmp_path: Path) -> None:
    project = tmp_path / "project"
    shutil.copytree(CONFIGS, project / "configs")
    shutil.copytree(CONFIGS.parent / "checkpoints/fashion", project / "checkpoints/fashion")
    weights = project / BASE
    weights.write_bytes(weights.read_bytes()[:-4] + bytes(4))  # a base that is nowhere else
    lightning(Path.cwd(), "predict", "--config", project / "configs/fashion/extract.yaml", *FEW)
    found = Card.read("runs/fashion/trajectories").base_fingerprint
    assert not (project / "runs").exists()
    lightning(Path.cwd(), "predict", "--config=configs/fashion/extract.yaml", *FEW, "--trainer.callbacks.folder=other")
    assert Card.read("other").base_fingerprint != found
