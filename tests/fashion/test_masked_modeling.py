from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.optim import AdamW
from torch.utils.data import DataLoader

from lit_shortcut.bases.maskgit.transformer import MaskGITTransformer
from lit_shortcut.fashion.masked_modeling import MaskedModelingTask
from lit_shortcut.fashion.tokenizer import FSQTokenizer
from lit_shortcut.images import LabelledImages
from lit_shortcut.weights import fingerprint, load_module

pytestmark = pytest.mark.filterwarnings("ignore:Found .* in eval mode")  # the frozen tokenizer, as meant


def make_task(**options: Any) -> MaskedModelingTask:
    torch.manual_seed(0)
    transformer = MaskGITTransformer(
        codebook_size=8, num_classes=2, grid=4, width=32, depth=1, num_heads=2, mlp_width=64
    )
    tokenizer = FSQTokenizer(levels=[8], width=8, image_size=8).eval().requires_grad_(False)
    with torch.no_grad():
        tokenizer.encoder[-1].weight.mul_(8)  # so that images have several codes
    return MaskedModelingTask(transformer, tokenizer, optimizer=lambda p: AdamW(p, lr=5e-3), **options)


def batches(count: int) -> DataLoader[LabelledImages]:
    """The same eight images of two classes, again and again."""
    pixels = torch.randint(256, (8, 1, 8, 8), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    batch = LabelledImages(pixels, torch.arange(8) % 2)
    return DataLoader([batch] * count, batch_size=None)  # type: ignore[arg-type]


def trainer(folder: Path, **options: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    defaults = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "enable_checkpointing": False}
    return L.Trainer(default_root_dir=folder, **(quiet | defaults | options))


def measured(task: MaskedModelingTask, folder: Path, count: int = 4) -> dict[str, float]:
    return dict(trainer(folder).validate(task, batches(count), verbose=False)[0])


def test_training_lowers_the_loss_and_leaves_the_tokenizer_alone(tmp_path: Path) -> None:
    task = make_task()
    before, tokenizer = measured(task, tmp_path), fingerprint(task.tokenizer.state_dict())  # type: ignore[attr-defined]
    trainer(tmp_path).fit(task, batches(80), batches(1))
    after = measured(task, tmp_path)
    assert after["val/loss"] < 0.9 * before["val/loss"]
    assert after["val/token_accuracy"] > before["val/token_accuracy"]
    assert fingerprint(task.tokenizer.state_dict()) == tokenizer  # type: ignore[attr-defined]


def test_masks_of_validation_repeat_and_those_of_training_do_not(tmp_path: Path) -> None:
    task = make_task()
    torch.manual_seed(1)
    once = measured(task, tmp_path)
    torch.manual_seed(2)
    assert measured(task, tmp_path) == once
    assert measured(task, tmp_path, count=1) != once  # each batch has masks of its own
    batch = next(iter(batches(1)))
    with torch.no_grad():
        losses = {task._loss(batch, None)[0].item() for _ in range(5)}
    assert len(losses) == 5


def test_masks_of_validation_leave_the_noise_of_training_alone() -> None:
    task, batch = make_task(), next(iter(batches(1)))
    before = torch.get_rng_state()
    task._loss(batch, torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), before)
    task._loss(batch, None)
    assert not torch.equal(torch.get_rng_state(), before)


def test_checkpoint_and_optimiser_hold_the_network_alone(tmp_path: Path) -> None:
    task = make_task()
    checkpoints = ModelCheckpoint(tmp_path, filename="masked")
    trainer(tmp_path, callbacks=[checkpoints], enable_checkpointing=True).fit(task, batches(2), batches(1))
    checkpoint = torch.load(tmp_path / "masked.ckpt", weights_only=True)
    ours = {f"network.{name}" for name in task.network.state_dict()}
    assert checkpoint["state_dict"].keys() == ours
    assert len(checkpoint["optimizer_states"][0]["state"]) == len(list(task.network.parameters()))
    loaded = load_module(MaskGITTransformer, tmp_path / "masked.ckpt")
    assert fingerprint(loaded.state_dict()) == fingerprint(task.network.state_dict())


@pytest.mark.parametrize("class_drop", [0.0, 1.0])
def test_dropped_classes_carry_no_label(class_drop: float) -> None:
    task = make_task(class_drop=class_drop)
    pixels, labels = next(iter(batches(1)))

    def loss(of: Tensor) -> float:
        generator = torch.Generator().manual_seed(0)
        return task._loss(LabelledImages(pixels, of), generator)[0].item()

    assert (loss(labels) == loss(1 - labels)) == (class_drop == 1.0)


def test_loss_counts_masked_places_alone() -> None:
    """The head's bias of a place gets a gradient where some sample's place is masked, and nowhere else."""
    task = make_task(class_drop=0.0)
    batch = LabelledImages(*(field[:1] for field in next(iter(batches(1)))))
    seen: list[Tensor] = []
    task.network.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    partly = 0
    for seed in range(6):
        task.zero_grad()
        task._loss(batch, torch.Generator().manual_seed(seed))[0].backward()
        is_masked = seen[-1][0] == task.network.mask_id
        partly += 0 < int(is_masked.sum()) < 16
        gradient = task.network.head_bias.grad
        assert gradient is not None
        assert torch.equal(gradient[:16].abs().sum(1) > 0, is_masked)
        assert not gradient[16:].any()
        assert not gradient[:, 8:].any()  # the mask and the classes are no codes
    assert partly > 0
