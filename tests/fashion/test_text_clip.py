"""The shipped CLIP of the text-to-image default, on images that the shipped class-to-image base draws."""

from __future__ import annotations

import hashlib

import pytest
import torch
import yaml
from torch import Tensor
from transformers import CLIPModel, CLIPProcessor

from datamodules.conditions import ClassLabels
from lit_shortcut.bases.maskgit.adapter import MaskGIT
from lit_shortcut.bases.maskgit.transformer import MaskGITTransformer
from lit_shortcut.evaluation.drawing import draw_row
from lit_shortcut.evaluation.rows import build_rows
from lit_shortcut.fashion.tokenizer import FSQTokenizer
from lit_shortcut.metrics.clip import CLIPScore
from lit_shortcut.sampling import Decoding
from tests.command_line import CONFIGS
from tests.metrics.asked import asked

CHECKPOINTS = CONFIGS.parent / "checkpoints"
SHIPPED = CHECKPOINTS / "fashion_text" / "clip"
TASK = yaml.safe_load((CONFIGS / "fashion_text" / "clip.yaml").read_text())["model"]["init_args"]
CLASS_PROMPTS: list[str] = TASK["class_prompts"]
COUNT = 20


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Two of each class, classes in turn."""
    base = MaskGIT(
        MaskGITTransformer.load(CHECKPOINTS / "fashion" / "base.safetensors"),
        FSQTokenizer.load(CHECKPOINTS / "fashion" / "tokenizer.safetensors"),
    )
    decoding = Decoding(**yaml.safe_load((CONFIGS / "parts" / "fashion_decoding.yaml").read_text()))
    (conditions,) = ClassLabels(COUNT, batch_size=COUNT, seed=3).loader()
    return draw_row(base, conditions, *build_rows([[8]], decoding)).images


def score(images: Tensor, prompts: list[str]) -> float:
    metric = CLIPScore(str(SHIPPED))
    metric.update(images, asked(torch.zeros(len(images)), tuple(prompts)))
    return float(metric.compute())


def test_images_are_nearer_to_their_own_classs_prompt_than_to_others(images: Tensor) -> None:
    own = CLASS_PROMPTS * (COUNT // 10)
    assert score(images, own) > score(images, own[1:] + own[:1]) + 20


@torch.no_grad()
def test_most_images_are_nearest_to_the_prompt_of_their_class(images: Tensor) -> None:
    model, processor = (kind.from_pretrained(SHIPPED) for kind in (CLIPModel, CLIPProcessor))
    inputs = processor(text=CLASS_PROMPTS, images=list(images), return_tensors="pt", padding=True, truncation=True)
    nearest = model(**inputs).logits_per_image.argmax(-1)
    assert (nearest == torch.arange(COUNT) % 10).float().mean() > 0.6


def test_a_word_about_brightness_moves_the_score_its_way(images: Tensor) -> None:
    coats = images[4::10]
    dark, bright = ["a dark coat"] * len(coats), ["a bright coat"] * len(coats)
    assert score(coats // 4, dark) > score(coats // 4, bright) + 5
    most = coats.amax((1, 2, 3), keepdim=True).clamp(min=1)
    light = (255 * (coats / most).sqrt()).to(torch.uint8)
    assert score(light, bright) > score(light, dark) + 5


def test_shipped_clip_is_small_and_the_one_in_the_manifest() -> None:
    entry = yaml.safe_load((CHECKPOINTS / "fashion_text" / "manifest.yaml").read_text())["clip/model.safetensors"]
    content = (SHIPPED / "model.safetensors").read_bytes()
    assert entry["sha256"] == hashlib.sha256(content).hexdigest()
    assert entry["licence"] == "Apache-2.0"
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 2_000_000
