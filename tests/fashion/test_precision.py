from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from lit_shortcut.bases.maskgit.transformer import MaskGITTransformer
from lit_shortcut.fashion.classifier import ClassifierTask, FashionCNN
from lit_shortcut.fashion.masked_modeling import MaskedModelingTask
from lit_shortcut.fashion.tokenizer import FSQTokenizer, TokenizerTask
from lit_shortcut.images import LabelledImages
from tests.tasks.short_runs import short_trainer

SIZES = {"codebook_size": 9, "num_classes": 10, "grid": 4, "width": 16, "depth": 1, "num_heads": 2, "mlp_width": 16}
TASKS: dict[str, Callable[[], L.LightningModule]] = {
    "classifier": lambda: ClassifierTask(FashionCNN(width=2)),
    "tokenizer": lambda: TokenizerTask(FSQTokenizer([3, 3], 8, 8)),
    "base": lambda: MaskedModelingTask(MaskGITTransformer(**SIZES), FSQTokenizer([3, 3], 8, 8)),
}


@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("bf16-true", torch.bfloat16), ("64-true", torch.float64), ("bf16-mixed", torch.float32)],
)
@pytest.mark.parametrize("task", TASKS)
def test_task_trains_in_each_precision(task: str, precision: str, dtype: torch.dtype, tmp_path: Path) -> None:
    pixels = torch.randint(256, (4, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    batches = DataLoader([LabelledImages(pixels, torch.arange(4))] * 2, batch_size=None)  # type: ignore[arg-type]
    torch.manual_seed(0)
    module = TASKS[task]()
    before = [parameter.detach().clone() for parameter in module.network.parameters()]
    short_trainer(tmp_path, precision=precision, enable_checkpointing=False).fit(module, batches, batches)
    after = list(module.network.parameters())
    assert {parameter.dtype for parameter in after} == {dtype}
    assert any(not torch.equal(old.to(dtype), new.cpu()) for old, new in zip(before, after, strict=True))
