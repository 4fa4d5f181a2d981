"""How well generated images follow their prompts, as a CLIP sees it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torchmetrics.multimodal.clip_score import CLIPScore as _CLIPScore

from lit_shortcut.contracts import Conditions
from lit_shortcut.hub import local_folder
from lit_shortcut.metrics.images import ImageMean, prompts_of
from lit_shortcut.weights import WeightsError

_FILES = ("*.json", "merges.txt", "model.safetensors", "pytorch_model.bin")  # torch's pickles are read as tensors alone


class CLIPScore(ImageMean):
    """Mean of 100 · cos(image, prompt) in the embedding of a CLIP, at least 0 (Hessel et al., arXiv 2104.08718).

    torchmetrics' measure, which leaves out the paper's factor 2.5. It depends on the CLIP: say which with the figure.
    Prompts longer than the CLIP's context (77 tokens in the published ones) are cut, and a warning says so; the token
    that ends a text stays, as in the original code, where torchmetrics would cut it off with the rest.

    Args:
        model: ``hf://openai/clip-vit-base-patch16`` or the like, or a folder that transformers' ``save_pretrained``
            wrote: a CLIPModel with its tokenizer and image processor.

    Raises:
        ModuleNotFoundError: without the package transformers.
        WeightsError: if there is no such model, or it is none.
    """

    def __init__(self, model: str) -> None:
        self.score = _CLIPScore(partial(_load, model))
        super().__init__(self.score)

    @torch.inference_mode()
    def update(self, images: Tensor, conditions: Conditions) -> None:
        """Take in uint8 ``images`` (B, 3, H, W), made for ``conditions.prompts``; raises ValueError without."""
        prompts = prompts_of(conditions)
        with torch.autocast(images.device.type, enabled=False):
            self.score.update(images, list(prompts))


def _transformers() -> ModuleType:
    try:
        return import_module("transformers")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"a CLIP needs the package transformers ({error}): pip install 'lit-shortcut[text]'", name=error.name
        ) from error


class _Features(nn.Module):
    """A CLIPModel whose features are tensors again, as torchmetrics 1.9 takes them; transformers 5 returns records."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def get_image_features(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.model.get_image_features(pixels).pooler_output
        return features

    def get_text_features(self, ids: Tensor, is_text: Tensor) -> Tensor:
        features: Tensor = self.model.get_text_features(ids, is_text).pooler_output
        return features


class _Inputs:
    """A CLIPProcessor that cuts texts at ``context`` tokens."""

    def __init__(self, processor: Any, context: int) -> None:
        self.processor, self.context = processor, context

    def __call__(
        self, images: Sequence[Tensor] | None = None, text: Sequence[str] | None = None, **settings: Any
    ) -> Any:
        if text is None:
            return self.processor.image_processor(images=images, return_tensors="pt")
        tokens = self.processor.tokenizer(text, verbose=False)["input_ids"]
        if max(map(len, tokens)) > self.context:
            rank_zero_warn(f"prompts longer than this CLIP's context of {self.context} tokens are cut")
        return self.processor.tokenizer(text, truncation=True, max_length=self.context, **settings)


def _load(address: str) -> tuple[_Features, _Inputs]:
    transformers = _transformers()
    folder = local_folder(address, _FILES)
    if not folder.is_dir():
        raise WeightsError(
            f"{address}: no such folder; expected one that holds a CLIPModel (config.json, model.safetensors, "
            "tokenizer.json, preprocessor_config.json), or a name on the hub such as hf://openai/clip-vit-base-patch16"
        )
    only_here: dict[str, Any] = {"local_files_only": True}
    try:
        model, found = transformers.CLIPModel.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, **only_here
        )
        processor = transformers.CLIPProcessor.from_pretrained(folder, **only_here)
    except Exception as error:  # a damaged or foreign folder fails in whatever way it is so
        raise WeightsError(f"{folder}: no CLIPModel with tokenizer and image processor ({error})") from error
    if found["missing_keys"]:
        raise WeightsError(f"{folder}: no CLIPModel; its weights lack {min(found['missing_keys'])}")
    return _Features(model).eval().requires_grad_(False), _Inputs(
        processor, model.config.text_config.max_position_embeddings
    )
