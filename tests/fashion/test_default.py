"""The shipped default, as its configurations use it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from datamodules.conditions import ClassLabels
from lit_shortcut.acceleration.shortcut import Shortcut
from lit_shortcut.bases.maskgit.adapter import MaskGIT
from lit_shortcut.bases.maskgit.transformer import MaskGITTransformer
from lit_shortcut.evaluation.drawing import draw_row
from lit_shortcut.evaluation.rows import build_rows
from lit_shortcut.fashion.classifier import FashionCNN, FashionFeatures
from lit_shortcut.fashion.tokenizer import FSQTokenizer
from lit_shortcut.metrics.distances import FrechetDistance
from lit_shortcut.metrics.images import ClassAgreement
from lit_shortcut.sampling import Decoding
from lit_shortcut.trajectory import Card, read_shard
from lit_shortcut.trajectory.index import check_shards
from lit_shortcut.trajectory.interface_file import load_interface
from tests.command_line import CONFIGS, lightning
from tests.metrics.asked import asked

SHIPPED = CONFIGS.parent / "checkpoints" / "fashion"
MANIFEST = yaml.safe_load((SHIPPED / "manifest.yaml").read_text())
DECODING, ACCELERATED = (
    Decoding(**yaml.safe_load((CONFIGS / "parts" / f"fashion_{name}.yaml").read_text()))
    for name in ("decoding", "accelerated_decoding")
)
MOST_BYTES = 15_000_000


@pytest.fixture(scope="module")
def default() -> MaskGIT:
    return MaskGIT(
        MaskGITTransformer.load(SHIPPED / "base.safetensors"), FSQTokenizer.load(SHIPPED / "tokenizer.safetensors")
    )


@pytest.fixture(scope="module")
def images(default: MaskGIT) -> dict[int, torch.Tensor]:
    """Forty images each, drawn in 12 steps and in 2."""
    (conditions,) = ClassLabels(40, batch_size=40, seed=77).loader()
    rows = build_rows([[12], [2]], DECODING)
    return {row.decoding.num_steps: draw_row(default, conditions, row).images for row in rows}


def labels() -> torch.Tensor:
    return torch.arange(40) % 10


def test_manifest_names_every_shipped_weight_file_and_no_other() -> None:
    assert MANIFEST.keys() == {path.relative_to(SHIPPED).as_posix() for path in SHIPPED.rglob("*.safetensors")}


def test_shipped_shortcut_belongs_to_the_shipped_base(default: MaskGIT) -> None:
    assert Shortcut.load(SHIPPED / "shortcut/model.safetensors").base_fingerprint == default.fingerprint


@pytest.mark.parametrize("name", MANIFEST)
def test_shipped_file_is_the_one_in_the_manifest(name: str) -> None:
    content, entry = (SHIPPED / name).read_bytes(), MANIFEST[name]
    assert len(content) == entry["bytes"]
    assert hashlib.sha256(content).hexdigest() == entry["sha256"]
    assert entry["licence"] == "Apache-2.0"
    assert entry.get("trained_on") or entry.get("images")


def test_shipped_files_are_small() -> None:
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*")) <= MOST_BYTES


def test_most_images_are_taken_for_the_class_asked_for(images: dict[int, torch.Tensor]) -> None:
    agreement = ClassAgreement(FashionCNN.load(SHIPPED / "classifier.safetensors"))
    agreement.update(images[12], asked(labels()))
    assert float(agreement.compute()) > 0.7


def test_more_steps_come_closer_to_real_images(images: dict[int, torch.Tensor]) -> None:
    distances = {}
    for num_steps, drawn in images.items():
        distance = FrechetDistance(
            FashionFeatures.load(SHIPPED / "classifier.safetensors"), SHIPPED / "reference.safetensors"
        )
        distance.update(drawn, asked(labels()))
        distances[num_steps] = float(distance.compute())
    assert distances[12] < distances[2]


def test_images_differ_from_one_another_within_a_class(images: dict[int, torch.Tensor]) -> None:
    assert images[12].shape == (40, 3, 28, 28)
    assert len(images[12].flatten(1).unique(dim=0)) == 40


def test_command_records_the_default_base(default: MaskGIT, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").symlink_to(SHIPPED.parent)
    size = ("--data.num_images=4", "--data.batch_size=2", "--model.decoding.num_steps=4")
    lightning(tmp_path, "predict", "--config", CONFIGS / "fashion" / "extract.yaml", *size)
    folder = tmp_path / "runs" / "fashion" / "trajectories"
    card = Card.read(folder)
    check_shards(folder, card)
    assert card.base_fingerprint == default.fingerprint
    assert card.spec == default.spec._asdict()
    assert (card.num_samples, card.num_steps, card.branches) == (4, 4, 2)
    recorded: dict[str, Any] = load_interface(folder, card).state_dict()
    for name, tensor in default.interface.state_dict().items():
        assert torch.equal(recorded[name], tensor)
    samples = [one for shard in (0, 1) for one in read_shard(folder, shard, card)]
    assert [int(one.conditions.labels) for one in samples] == [0, 1, 2, 3]
    (conditions,) = ClassLabels(4, batch_size=4, seed=card.seed).loader()
    drawn = draw_row(default, conditions, *build_rows([[4]], ACCELERATED)).images
    assert torch.equal(default.decode(torch.cat([one.tokens for one in samples])), drawn)
