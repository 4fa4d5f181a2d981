from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from torch.utils.data import DataLoader

from datamodules.trajectories import TrajectoryDataModule
from lit_shortcut.acceleration.card import model_card
from lit_shortcut.acceleration.origin import BaseReference, Origin
from lit_shortcut.acceleration.shortcut import Shortcut
from lit_shortcut.callbacks.ema import ModuleEMA
from lit_shortcut.callbacks.export import ExportShortcut, ExportWeights
from lit_shortcut.fashion.classifier import ClassifierTask, FashionCNN
from lit_shortcut.images import LabelledImages
from lit_shortcut.networks.shortcut import ShortcutNet
from lit_shortcut.tasks.shortcut import ShortcutTask
from lit_shortcut.weights import load_tensors, update_manifest
from tests.tiny_trajectories import SPEC, write_set


def fit(path: Path, *callbacks: L.Callback, ckpt_path: Path | None = None, **arguments: Any) -> ClassifierTask:
    generator = torch.Generator().manual_seed(0)
    batches = [
        LabelledImages(torch.randint(256, (4, 1, 8, 8), dtype=torch.uint8, generator=generator), torch.arange(4) % 2)
        for _ in range(3)
    ]
    loader: Any = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = FashionCNN(num_classes=2, width=2)
        task = ClassifierTask(network, num_classes=2, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
        trainer = L.Trainer(
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            num_sanity_val_steps=0,
            callbacks=[*callbacks, ExportWeights(path, licence="MIT", trained_on="noise")],
            **({"max_epochs": 1} | arguments),
        )
        trainer.fit(task, loader, loader, ckpt_path=ckpt_path)
    return task


def parameters(network: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])


def test_exported_file_holds_the_network_that_fit_leaves(tmp_path: Path) -> None:
    task = fit(tmp_path / "deep" / "net.safetensors")
    loaded = FashionCNN.load(tmp_path / "deep" / "net.safetensors")
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, task.network.state_dict()[name])


def test_weights_stored_in_half_precision_are_loaded_in_float32(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    task = ClassifierTask(FashionCNN(num_classes=2, width=2), num_classes=2)
    ExportWeights(path, "MIT", "noise", dtype="float16").write(task)
    assert {t.dtype for t in load_tensors(path)[0].values() if t.is_floating_point()} == {torch.float16}
    for name, tensor in FashionCNN.load(path).state_dict().items():
        assert tensor.dtype == task.network.state_dict()[name].dtype
        torch.testing.assert_close(tensor, task.network.state_dict()[name], atol=1e-3, rtol=1e-3)


def test_averaged_weights_are_exported_where_an_average_runs(tmp_path: Path) -> None:
    fit(tmp_path / "raw.safetensors")
    averaged = fit(tmp_path / "averaged.safetensors", ModuleEMA(decay=0.9))
    raw, average = (parameters(FashionCNN.load(tmp_path / f"{name}.safetensors")) for name in ("raw", "averaged"))
    assert torch.equal(average, parameters(averaged.network))
    assert not torch.allclose(raw, average, atol=1e-5)


def test_finished_run_that_is_resumed_exports_its_average_wherever_the_export_stands(tmp_path: Path) -> None:
    def run(name: str, **arguments: Any) -> ClassifierTask:
        before = ExportWeights(tmp_path / name / "before.safetensors", "MIT", "noise")
        steps = {"max_epochs": -1, "max_steps": 3}
        return fit(tmp_path / name / "after.safetensors", before, ModuleEMA(decay=0.9), **steps, **arguments)

    run("whole").trainer.save_checkpoint(tmp_path / "end.ckpt")
    run("resumed", ckpt_path=tmp_path / "end.ckpt")
    one, *others = (
        parameters(FashionCNN.load(tmp_path / name / f"{export}.safetensors"))
        for name in ("whole", "resumed")
        for export in ("before", "after")
    )
    assert all(torch.equal(one, other) for other in others)


def test_manifest_says_what_made_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/somewhere/bin/lit-shortcut", "fit", "--config", "configs/x.yaml"])
    (tmp_path / "manifest.yaml").write_text("other.safetensors: {bytes: 1}\n")
    path = tmp_path / "net.safetensors"
    fit(path)
    entries = yaml.safe_load((tmp_path / "manifest.yaml").read_text())
    assert entries["other.safetensors"] == {"bytes": 1}
    entry = entries["net.safetensors"]
    accuracy = entry["metrics"].pop("val/accuracy")
    assert 0 <= accuracy <= 1
    assert entry == {
        "bytes": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "licence": "MIT",
        "trained_on": "noise",
        "made_by": "lit-shortcut fit --config configs/x.yaml",
        "optimizer_steps": 3,
        "metrics": {},
    }


def test_same_bytes_keep_their_metrics_in_the_manifest(tmp_path: Path) -> None:
    path, manifest = tmp_path / "net.safetensors", tmp_path / "manifest.yaml"
    manifest.touch()
    path.write_bytes(b"one")
    update_manifest(path, {"metrics": {"val/mse": 1.0}})
    update_manifest(path, {"metrics": {}})
    assert yaml.safe_load(manifest.read_text())["net.safetensors"]["metrics"] == {"val/mse": 1.0}
    path.write_bytes(b"two")
    update_manifest(path, {"metrics": {}})
    assert yaml.safe_load(manifest.read_text())["net.safetensors"]["metrics"] == {}


def test_trial_run_exports_nothing(tmp_path: Path) -> None:
    fit(tmp_path / "net.safetensors", fast_dev_run=True)
    assert list(tmp_path.iterdir()) == []


def test_budget_beyond_the_steps_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    write_set(tmp_path / "set")
    export = ExportShortcut(tmp_path / "shortcut", "MIT", "noise", budget=5)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, max_steps=1, callbacks=[export])
    task = ShortcutTask(ShortcutNet(width=SPEC.width, num_heads=1))
    with pytest.raises(ValueError, match=r"ExportShortcut must lie in 0\.\.4, the set's steps; got 5"):
        trainer.fit(task, datamodule=TrajectoryDataModule(str(tmp_path / "set")))
    assert not (tmp_path / "shortcut").exists()


def test_card_of_a_shortcut_without_a_budget_can_be_followed(tmp_path: Path) -> None:
    card = model_card(Origin(num_steps=12), {})
    assert 'load("FOLDER", budget=3)' in card
    assert "| steps | N = 12, of which the base computes as many as asked for, by default all |" in card


def test_shortcut_is_exported_as_a_folder_with_its_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = ShortcutTask(ShortcutNet(width=16, num_heads=2))
    card = {"base_fingerprint": "0123", "num_steps": 5, "decoding": {"num_steps": 5}, "spec": {"num_classes": 3}}
    monkeypatch.setattr(task, "network_facts", lambda: card)
    base = BaseReference(name="dimoo", source="hf://owner/base")
    export = ExportShortcut(tmp_path / "shortcut", "MIT", "noise", base, budget=2)
    assert export.write(task) == tmp_path / "shortcut" / "model.safetensors"
    found = Shortcut.from_pretrained(tmp_path / "shortcut")
    expected = Origin(replace(base, fingerprint="0123"), 5, {"num_steps": 5}, "even", 2, "MIT", "noise", num_classes=3)
    assert found.origin == expected
    for name, tensor in found.network.state_dict().items():
        assert torch.equal(tensor, task.network.state_dict()[name])
    written = {"README.md", "config.json", "model.safetensors"}
    readme = tmp_path / "shortcut" / "README.md"
    fresh = readme.read_text()
    readme.write_text("measurements of the shortcut that is here")
    for name in ("pareto.png", "plan.json"):
        (tmp_path / "shortcut" / name).write_bytes(b"")
    export.write(task)  # as a finished run does that is resumed
    assert readme.read_text() == "measurements of the shortcut that is here"
    assert {"pareto.png", "plan.json"} < {path.name for path in (tmp_path / "shortcut").iterdir()}
    (tmp_path / "shortcut" / "model.safetensors").write_bytes(b"half a file")
    export.write(task)
    assert readme.read_text() == fresh
    assert {path.name for path in (tmp_path / "shortcut").iterdir()} == written
