from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lit_shortcut.fashion.classifier import ClassifierTask, FashionCNN
from lit_shortcut.images import LabelledImages
from lit_shortcut.weights import load_module
from tests.tasks.short_runs import QUIET


def halves(count: int, seed: int) -> LabelledImages:
    """Class 0 is bright above, class 1 below; mirroring changes neither."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    pixels = torch.randint(100, (count, 1, 8, 8), dtype=torch.uint8, generator=generator)
    pixels[labels == 0, :, :4] += 100
    pixels[labels == 1, :, 4:] += 100
    return LabelledImages(pixels, labels)


def loader(*batches: LabelledImages) -> DataLoader[LabelledImages]:
    return DataLoader(list(batches), batch_size=None)  # type: ignore[arg-type]


def make_task() -> ClassifierTask:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = FashionCNN(num_classes=2, width=2)
    return ClassifierTask(network, num_classes=2, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2))


def test_short_fit_tells_two_kinds_of_images_apart(tmp_path: Path) -> None:
    task, trainer = make_task(), L.Trainer(**QUIET, max_epochs=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        trainer.fit(task, loader(*(halves(16, seed) for seed in range(20))), loader(halves(32, 100)))
    assert trainer.callback_metrics["val/accuracy"] == 1
    trainer.save_checkpoint(tmp_path / "classifier.ckpt")
    loaded = load_module(FashionCNN, tmp_path / "classifier.ckpt")
    unseen = halves(32, 101)
    assert torch.equal(loaded(unseen.pixels).argmax(1), unseen.labels)


def test_accuracy_is_the_share_of_all_images_however_they_are_batched() -> None:
    task = make_task()
    with torch.no_grad():
        task.network.head.weight.zero_()  # type: ignore[union-attr, operator]
        task.network.head.bias.copy_(torch.tensor([1.0, 0.0]))  # type: ignore[union-attr, operator]
    mostly_ones = LabelledImages(halves(6, 0).pixels, torch.tensor([1, 1, 1, 1, 1, 0]))
    zeros = LabelledImages(halves(2, 0).pixels, torch.tensor([0, 0]))
    (values,) = L.Trainer(**QUIET).test(task, loader(mostly_ones, zeros), verbose=False)
    assert values["test/accuracy"] == pytest.approx(3 / 8)


def test_every_other_batch_is_mirrored(monkeypatch: pytest.MonkeyPatch) -> None:
    task, batch = make_task(), halves(8, 0)
    task.eval()  # no dropout
    monkeypatch.setattr(task, "log", lambda *arguments, **options: None)

    def expected(pixels: Tensor) -> Tensor:
        return F.cross_entropy(task.network(pixels), batch.labels, label_smoothing=0.1)

    mirrored = batch.pixels[..., range(7, -1, -1)]
    assert not torch.equal(expected(batch.pixels), expected(mirrored))
    for batch_idx in range(4):
        pixels = mirrored if batch_idx % 2 else batch.pixels
        assert torch.equal(task.training_step(batch, batch_idx), expected(pixels))
