"""The MaskGIT configurations as they are, hub addresses included, on files of the release's form but tiny."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import yaml

from lit_shortcut.bases.maskgit import imagenet
from lit_shortcut.bases.maskgit.transformer import NAMES as MASKGIT
from lit_shortcut.bases.maskgit.transformer import MaskGITTransformer
from lit_shortcut.networks.shortcut import NAMES as SHORTCUT
from lit_shortcut.networks.shortcut import ShortcutNet
from lit_shortcut.published import save_published
from lit_shortcut.trajectory import Card
from lit_shortcut.weights import WeightsError, fingerprint
from tests.command_line import CONFIGS, lightning
from tests.parity.taming import Sizes, random_weights, write_folder

MASKGIT_YAMLS = CONFIGS / "maskgit"
GRID, WIDTH = 8, 32
ADDRESSES = {"llvictorll/Maskgit-pytorch": "pretrained_maskgit", "Kaiwen-Zhu/MIGM-Shortcut": "MaskGIT-Shortcut"}


@pytest.fixture(scope="module")
def transformer() -> MaskGITTransformer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MaskGITTransformer(1024, 1000, GRID, WIDTH, depth=1, num_heads=16, mlp_width=3072)


@pytest.fixture(scope="module")
def hub(transformer: MaskGITTransformer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A hub's cache with both repositories; there is no network."""
    cache = tmp_path_factory.mktemp("hub")
    folders = {}
    for repository, folder in ADDRESSES.items():
        home = cache / f"models--{repository.replace('/', '--')}"
        folders[repository] = home / "snapshots" / ("d" * 40) / folder
        folders[repository].mkdir(parents=True)
        (home / "refs").mkdir()
        (home / "refs" / "main").write_text("d" * 40)
    base, shortcut = folders.values()
    (base / "MaskGIT").mkdir()
    save_published(base / "MaskGIT" / "MaskGIT_ImageNet_512.pth", transformer, MASKGIT)
    sizes = Sizes(1024, 4, 4, 32, [1, 1], 1, 8, [])
    write_folder(base / "VQGAN", random_weights(sizes, seed=0), sizes)
    save_published(shortcut / "maskgit-shortcut.pth", ShortcutNet(WIDTH), SHORTCUT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
        patch.setitem(imagenet.SIZES, "base", {"width": WIDTH, "depth": 1})
        yield cache


@pytest.fixture(scope="module")
def recorded(hub: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    words = ["--model.base.init_args.grid", GRID, "--data.num_images", 6, "--data.batch_size", 2]
    lightning(folder, "predict", "--config", MASKGIT_YAMLS / "extract.yaml", *words)
    return folder


def test_extract_records_the_published_base_as_published(recorded: Path, transformer: MaskGITTransformer) -> None:
    card = Card.read(recorded / "runs/maskgit/trajectories")
    assert card.base_fingerprint == fingerprint(transformer.state_dict())
    assert (card.num_steps, card.branches, card.num_classes) == (15, 2, 1000)
    assert card.decoding | {"guidance": 2.8, "schedule": "arccos", "confidence_noise": 7.0} == card.decoding


def test_fit_trains_on_them(recorded: Path) -> None:
    words = ["--trainer.devices", 1, "--trainer.accelerator", "cpu", "--trainer.strategy", "auto"]
    words += ["--trainer.max_steps", 3, "--trainer.limit_train_batches", 3, "--trainer.logger", "false"]
    words += ["--trainer.limit_val_batches", 1, "--data.validation_shards", 1, "--data.num_workers", 0]
    words += ["--model.network.init_args.width", WIDTH, "--trainer.callbacks"]
    words += [json.dumps(yaml.safe_load((MASKGIT_YAMLS / "fit.yaml").read_text())["trainer"]["callbacks"][-1:])]
    lightning(recorded, "fit", "--config", MASKGIT_YAMLS / "fit.yaml", *words)
    network = ShortcutNet.load(recorded / "runs/maskgit/shortcut/model.safetensors")
    assert network.widen.weight.abs().max() > 0


def test_evaluate_measures_the_published_rows(hub: Path, tmp_path: Path) -> None:
    words = ["--model.base.init_args.grid", GRID, "--data.num_images", 2, "--model.latency_rounds", 0]
    words += ["--model.metrics", "null", "--trainer.callbacks", "null", "--trainer.logger", "false"]
    lightning(tmp_path, "test", "--config", MASKGIT_YAMLS / "evaluate.yaml", *words)
    vanilla = [f"vanilla_n{n}" for n in (8, 9, 11, 13, 15, 32)]
    accelerated = [f"shortcut_n{n}_b{b}" for n, b in ((15, 7), (15, 8), (32, 8), (32, 9), (32, 12))]
    rows = {path.name for path in (tmp_path / "runs/maskgit/report/rows").iterdir()}
    assert rows == {f"{name}_seed10.json" for name in vanilla + accelerated}


def test_random_weights_need_no_files_and_are_labelled(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    extract = ["predict", "--config", MASKGIT_YAMLS / "extract.yaml"]
    with pytest.raises(WeightsError, match=r"MaskGIT_ImageNet_512\.pth: not in the hub's cache"):
        lightning(tmp_path, *extract)
    words = ["--config", MASKGIT_YAMLS / "random.yaml", "--model.base.init_args.grid", 4]
    lightning(tmp_path, *extract, *words, "--model.decoding.num_steps", 3)
    card = Card.read(tmp_path / "runs/maskgit_random/trajectories")
    assert card.base_fingerprint.startswith("random-")
    assert card.num_samples == 4
