"""The shipped text-to-image default, as its configurations use it."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import yaml

from lit_shortcut.acceleration.shortcut import Shortcut
from lit_shortcut.bases.dimoo.llada import LLaDA
from lit_shortcut.fashion.garments import read_prompt
from lit_shortcut.weights import fingerprint
from tests.command_line import CONFIGS, lightning

SHIPPED = CONFIGS.parent / "checkpoints" / "fashion_text"
MANIFEST = yaml.safe_load((SHIPPED / "manifest.yaml").read_text())
MOST_BYTES = 12_000_000


@pytest.mark.parametrize("name", MANIFEST)
def test_shipped_file_is_the_one_in_the_manifest(name: str) -> None:
    content, entry = (SHIPPED / name).read_bytes(), MANIFEST[name]
    assert len(content) == entry["bytes"]
    assert hashlib.sha256(content).hexdigest() == entry["sha256"]
    assert entry["licence"] == "Apache-2.0"
    assert entry["trained_on"]
    verb = "validate" if name == "linear.safetensors" else "fit"
    assert entry["made_by"].startswith(f"lightning {verb} --config configs/fashion_text/")


def test_manifest_names_every_shipped_weight_file_and_no_other() -> None:
    assert MANIFEST.keys() == {path.relative_to(SHIPPED).as_posix() for path in SHIPPED.rglob("*.safetensors")}


def test_shipped_files_are_small() -> None:
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*")) <= MOST_BYTES


def test_shipped_shortcut_belongs_to_the_shipped_base() -> None:
    base = LLaDA.load(SHIPPED / "base.safetensors")
    assert Shortcut.load(SHIPPED / "shortcut/model.safetensors").base_fingerprint == fingerprint(base.state_dict())


def test_held_out_prompts_all_name_a_class_and_many_an_attribute() -> None:
    prompts = (SHIPPED / "held_out_prompts.txt").read_text().splitlines()
    read = [read_prompt(prompt) for prompt in prompts]
    assert len(prompts) == 2000
    assert {one.label for one in read} == set(range(10))
    assert sum(len(one.attributes) for one in read) > 1500


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Vanilla and shortcut measured by the command on 20 prompts, one seed that no report uses."""
    folder = tmp_path_factory.mktemp("fashion_text")
    (folder / "checkpoints").symlink_to(SHIPPED.parent)
    shutil.copytree(SHIPPED / "shortcut", folder / "runs/fashion_text/shortcut")
    words = ('--model.rows=[[16], [16, 3, "shortcut", "early"]]', "--data.run_seeds=[77]", "--model.latency_rounds=1")
    words += ("--data.num_images=20", "--data.batch_size=20", "--model.latency_batch_size=2", "--trainer.logger=false")
    lightning(folder, "test", "--config", CONFIGS / "fashion_text" / "evaluate.yaml", *words)
    return folder / "runs" / "fashion_text" / "report"


@pytest.mark.parametrize("row", ["vanilla_n16", "shortcut_n16_b3_early"])
def test_images_follow_their_prompts(report: Path, row: str) -> None:
    values = json.loads((report / "rows" / f"{row}_seed77.json").read_text())["values"]
    assert values["class_agreement"] > 0.75
    assert values["attribute_agreement"] > 0.7
    assert values["clip_score"] > 40  # shuffled captions of real images score about 10


def test_report_shows_each_prompt_under_its_images(report: Path) -> None:
    prompts = (SHIPPED / "held_out_prompts.txt").read_text().splitlines()[:10]
    columns = json.loads((report / "images" / "vanilla_n16.json").read_text())
    assert columns["prompts"] == prompts
    assert {"report.md", "pareto.png", "grids.png"} <= {path.name for path in report.iterdir()}
