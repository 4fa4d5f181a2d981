from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.optim import AdamW
from torch.utils.data import DataLoader

from lit_shortcut.bases.dimoo.llada import LLaDA
from lit_shortcut.bases.dimoo.toy import toy_dimoo
from lit_shortcut.bases.prompted_llada import PromptContext
from lit_shortcut.contracts import Conditions
from lit_shortcut.fashion.masked_modeling import PromptedMaskedModelingTask
from lit_shortcut.fashion.tokenizer import FSQTokenizer
from lit_shortcut.images import CaptionedImages
from lit_shortcut.weights import fingerprint, load_module, save_module
from tests.tasks.short_runs import short_trainer

pytestmark = pytest.mark.filterwarnings("ignore:Found .* in eval mode")  # the frozen tokenizer, as meant


def make_task(**options: Any) -> PromptedMaskedModelingTask:
    base = toy_dimoo()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        tokenizer = FSQTokenizer(levels=[8], width=8, image_size=8).eval().requires_grad_(False)
        tokenizer.encoder[-1].weight.mul_(8)  # so that images have several codes
    base.tokenizer = tokenizer
    return PromptedMaskedModelingTask(base, optimizer=lambda p: AdamW(p, lr=5e-3), **options)


def batch() -> CaptionedImages:
    pixels = torch.randint(256, (8, 1, 8, 8), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    return CaptionedImages(pixels, torch.arange(8) % 2, ("a red cat", "two") * 4)


def batches(count: int) -> DataLoader[CaptionedImages]:
    return DataLoader([batch()] * count, batch_size=None)  # type: ignore[arg-type]


def trainer(folder: Path) -> L.Trainer:
    return short_trainer(folder, enable_checkpointing=False)


def measured(task: PromptedMaskedModelingTask, folder: Path) -> dict[str, float]:
    return dict(trainer(folder).validate(task, batches(4), verbose=False)[0])


def test_training_lowers_the_loss_and_leaves_the_tokenizer_alone(tmp_path: Path) -> None:
    task = make_task()
    before, tokenizer = measured(task, tmp_path), fingerprint(task.base.tokenizer.state_dict())  # type: ignore[attr-defined]
    trainer(tmp_path).fit(task, batches(80), batches(1))
    after = measured(task, tmp_path)
    assert after["val/loss"] < 0.9 * before["val/loss"]
    assert after["val/token_accuracy"] > before["val/token_accuracy"]
    assert fingerprint(task.base.tokenizer.state_dict()) == tokenizer  # type: ignore[attr-defined]


def test_every_parameter_is_trained_but_rows_of_tokens_never_seen(tmp_path: Path) -> None:
    task = make_task(prompt_drop=0.5)
    task._loss(batch(), torch.Generator().manual_seed(0))[0].backward()
    assert all(p.grad is not None and p.grad.any() for p in task.network.parameters())


def test_trained_network_is_saved_and_loaded_as_a_base_takes_it(tmp_path: Path) -> None:
    task = make_task()
    save_module(tmp_path / "base.safetensors", task.network)
    loaded = load_module(LLaDA, tmp_path / "base.safetensors")
    assert fingerprint(loaded.state_dict()) == toy_dimoo().fingerprint


@pytest.mark.parametrize("prompt_drop", [0.0, 1.0])
def test_dropped_prompts_say_nothing(prompt_drop: float) -> None:
    task = make_task(prompt_drop=prompt_drop)

    def loss(first: str) -> float:
        changed = batch()._replace(prompts=(first, *batch().prompts[1:]))
        return task._loss(changed, torch.Generator().manual_seed(0))[0].item()

    assert (loss("a red cat") == loss("a blue dog")) == (prompt_drop == 1.0)


def test_a_dropped_prompt_is_the_one_that_guidance_contrasts_with() -> None:
    task, pictures = make_task(), batch()
    is_dropped = torch.ones(len(pictures.prompts), dtype=torch.bool)
    conditions = Conditions(pictures.labels, pictures.labels, pictures.labels, pictures.prompts)
    guided = task.base.context(conditions, guided=True)
    assert isinstance(guided, PromptContext)
    (length,) = {len(ids) for ids in task.texts(pictures.prompts, is_dropped)}
    assert task.texts(pictures.prompts, is_dropped) == guided.ids[1, :, :length].tolist()


def test_a_tokenizer_that_only_decodes_is_refused() -> None:
    class Decoder(torch.nn.Module):
        def decode(self, tokens: torch.Tensor) -> torch.Tensor:
            return tokens

    base = toy_dimoo()
    base.tokenizer = Decoder()
    with pytest.raises(ValueError, match="must encode images; Decoder only decodes"):
        PromptedMaskedModelingTask(base)
