from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader
from transformers.models.clip.modeling_clip import image_text_contrastive_loss

from lit_shortcut.callbacks.ema import ModuleEMA
from lit_shortcut.callbacks.export import ExportFolder
from lit_shortcut.fashion.clip import ClipTask, SmallCLIP, contrastive_loss
from lit_shortcut.images import CaptionedImages
from lit_shortcut.metrics.clip import CLIPScore
from lit_shortcut.weights import fingerprint, load_module
from tests.fashion.small_clip import SIZES, write_tokenizer
from tests.metrics.asked import asked
from tests.tasks.short_runs import short_trainer

CLASSES = ["a dark coat", "a bright coat"]


def make_task(folder: Path) -> ClipTask:
    words = write_tokenizer(folder / "words.json")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        clip = SmallCLIP(str(words), **SIZES)
    return ClipTask(clip, CLASSES, optimizer=lambda p: torch.optim.AdamW(p, lr=3e-3))


def batches(count: int, seed: int) -> Any:
    """Dark and bright noise, captioned by which it is."""
    generator = torch.Generator().manual_seed(seed)

    def batch() -> CaptionedImages:
        labels = torch.randint(2, (16,), generator=generator)
        noise = torch.randint(100, (16, 1, 8, 8), generator=generator)
        prompts = tuple(CLASSES[label] for label in labels.tolist())
        return CaptionedImages((noise + 150 * labels.view(-1, 1, 1, 1)).to(torch.uint8), labels, prompts)

    return DataLoader([batch() for _ in range(count)], batch_size=None)  # type: ignore[arg-type]


def trainer(folder: Path, *callbacks: L.Callback) -> L.Trainer:
    checkpoint = ModelCheckpoint(folder / "checkpoints", filename="clip")
    return short_trainer(folder, num_sanity_val_steps=0, callbacks=[checkpoint, *callbacks])


def logits(size: int) -> torch.Tensor:
    return torch.randn(size, size, generator=torch.Generator().manual_seed(size)) * 3


def test_loss_of_different_prompts_is_transformers_own() -> None:
    expected = image_text_contrastive_loss(logits(5).T)
    torch.testing.assert_close(contrastive_loss(logits(5), list("abcde")), expected)


def test_loss_is_least_where_equal_prompts_share_their_images() -> None:
    prompts = ["a", "b", "a", "c"]
    shared = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]]).float()
    best = contrastive_loss(30 * shared, prompts)
    assert best == pytest.approx(torch.log(torch.tensor(2.0)).item() / 2, abs=1e-4)  # two of four are torn between two
    assert contrastive_loss(30 * torch.eye(4), prompts) > best + 1
    assert contrastive_loss(30 * shared.roll(1, 0), prompts) > best + 1


def test_training_tells_captions_apart_and_its_checkpoint_loads(tmp_path: Path) -> None:
    task = make_task(tmp_path)
    run = trainer(tmp_path)
    run.fit(task, batches(60, seed=1), batches(2, seed=2))
    (measured,) = run.test(task, batches(4, seed=3), verbose=False)
    assert measured["test/class_accuracy"] > 0.95
    assert measured["test/score"] > measured["test/score_shuffled"] + 10
    loaded = load_module(SmallCLIP, tmp_path / "checkpoints" / "clip.ckpt")
    assert fingerprint(loaded.state_dict()) == fingerprint(task.network.state_dict())


def test_scores_logged_are_those_of_the_exported_clip(tmp_path: Path) -> None:
    task = make_task(tmp_path)
    export = ExportFolder(tmp_path / "out" / "clip", licence="MIT", trained_on="noise")
    run = trainer(tmp_path, ModuleEMA(decay=0.5), export)
    (batch,) = batches(1, seed=2)
    run.fit(task, batches(12, seed=1), batches(1, seed=2))
    metric = CLIPScore(str(tmp_path / "out" / "clip"))
    metric.update(batch.pixels.expand(-1, 3, -1, -1), asked(batch.labels, batch.prompts))
    assert float(metric.compute()) == pytest.approx(float(run.callback_metrics["val/score"]), rel=1e-4)
    metric.reset()
    neighbours = batch.prompts[-1:] + batch.prompts[:-1]
    metric.update(batch.pixels.expand(-1, 3, -1, -1), asked(batch.labels, neighbours))
    assert float(metric.compute()) == pytest.approx(float(run.callback_metrics["val/score_shuffled"]), rel=1e-4)
    entry = yaml.safe_load((tmp_path / "out" / "manifest.yaml").read_text())["clip/model.safetensors"]
    assert entry["bytes"] == (tmp_path / "out" / "clip" / "model.safetensors").stat().st_size
    assert entry["metrics"]["val/score"] == pytest.approx(float(run.callback_metrics["val/score"]), abs=1e-5)


def test_scale_stays_at_one_hundred_or_below(tmp_path: Path) -> None:
    task = make_task(tmp_path)
    task.network.clip.logit_scale.data.fill_(6.0)
    trainer(tmp_path).fit(task, batches(1, seed=1), batches(1, seed=2))
    assert float(task.network.clip.logit_scale.detach().exp()) == pytest.approx(100, rel=1e-4)
