from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.optim import AdamW
from torch.utils.data import DataLoader

from lit_shortcut.contracts import Conditions
from lit_shortcut.fashion.tokenizer import FSQTokenizer, TokenizerTask
from lit_shortcut.images import LabelledImages
from lit_shortcut.metrics.images import collection
from lit_shortcut.weights import fingerprint
from tests.metrics.brightness import Brightness
from tests.metrics.difference import Difference
from tests.tasks.short_runs import short_trainer


def make_task() -> TokenizerTask:
    torch.manual_seed(0)
    return TokenizerTask(FSQTokenizer(levels=[5, 5], width=8, image_size=8), optimizer=lambda p: AdamW(p, lr=3e-3))


def batches(count: int) -> DataLoader[LabelledImages]:
    """The same images of one grey each, again and again: few codes can tell them apart."""
    grey = torch.randint(256, (8, 1, 1, 1), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    batch = LabelledImages(grey.expand(-1, -1, 8, 8), torch.zeros(8, dtype=torch.long))
    return DataLoader([batch] * count, batch_size=None)  # type: ignore[arg-type]


def test_training_lowers_the_loss_and_its_checkpoint_loads(tmp_path: Path) -> None:
    task = make_task()
    trainer = short_trainer(tmp_path, callbacks=[ModelCheckpoint(tmp_path, filename="tokenizer")])
    before = trainer.validate(task, batches(1), verbose=False)[0]["val/loss"]
    trainer.fit(task, batches(60), batches(1))
    after = trainer.validate(task, batches(1), verbose=False)[0]["val/loss"]
    assert after < 0.7 * before
    loaded = FSQTokenizer.load(tmp_path / "tokenizer.ckpt")
    assert fingerprint(loaded.state_dict()) == fingerprint(task.network.state_dict())


def test_loss_is_mean_absolute_plus_mean_squared_error() -> None:
    task = make_task()
    batch = next(iter(batches(1)))
    pixels = batch.pixels.double() / 127.5 - 1
    error = task.network(pixels.float()).double() - pixels
    expected = error.abs().mean() + error.square().mean()
    assert task._loss(batch).item() == pytest.approx(expected.item(), rel=1e-5)


def test_reconstructions_are_measured_against_the_labels_of_their_images() -> None:
    task, seen = make_task(), []

    class Record(Brightness):
        def update(self, images: Tensor, conditions: Conditions) -> None:
            super().update(images, conditions)
            seen.append((images, conditions.labels))

    task.metrics = collection({"brightness": Record(), "difference": Difference()})
    batch = next(iter(batches(1)))._replace(labels=torch.arange(8))
    task.test_step(batch, 0)
    ((images, labels),) = seen
    assert torch.equal(images, task.network.decode(task.network.encode(batch.pixels)))
    assert torch.equal(labels, batch.labels)
    error = (images.float() - batch.pixels.float()).abs().mean()
    assert task.metrics.compute()["difference"] == pytest.approx(float(error), rel=1e-5)
