"""CLIP score: how well generated images follow their prompts."""

from __future__ import annotations

from hashlib import sha256
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn import functional as F

from lit_shortcut.contracts import Conditions, require_prompts
from lit_shortcut.hub import local_folder
from lit_shortcut.metrics.images import FrozenNetwork, ImageMean
from lit_shortcut.weights import WeightsError

_FILES = ("*.json", "merges.txt", "model.safetensors", "pytorch_model.bin")  # torch's pickles are read as tensors only


class CLIPScore(ImageMean):
    """Mean of 100 · cos(image, prompt) in the embedding of a CLIP, at least 0 (Hessel et al., arXiv 2104.08718).

    As in torchmetrics, without the paper's factor 2.5. The score depends on the CLIP: quote it with the model's name.
    Prompts longer than the CLIP's context (77 tokens in the published ones) are cut, with a warning; the end token
    stays, as in the original code.

    Args:
        model: address such as ``hf://openai/clip-vit-base-patch16``, or a folder that transformers' ``save_pretrained``
            wrote: a CLIPModel with its tokenizer and image processor.

    Raises:
        ModuleNotFoundError: without the package transformers.
        WeightsError: if there is no such model, or it is not a CLIPModel.
    """

    higher_is_better = True

    def __init__(self, model: str) -> None:
        super().__init__()
        clip, self.processor, folder = _load(model)
        self.clip, self.context = FrozenNetwork(clip), clip.config.text_config.max_position_embeddings
        self.files = _digest(folder)

    def update(self, images: Tensor, conditions: Conditions) -> None:
        """Add uint8 ``images`` (B, 3, H, W), made for ``conditions.prompts``; raises ValueError without prompts."""
        prompts, device = list(require_prompts(conditions)), images.device
        pixels = self.processor.image_processor(images=list(images.cpu()), return_tensors="pt").to(device)
        lengths = map(len, self.processor.tokenizer(prompts, verbose=False)["input_ids"])
        if max(lengths) > self.context:
            rank_zero_warn(f"prompts longer than this CLIP's context of {self.context} tokens are cut")
        options: dict[str, Any] = {"padding": True, "truncation": True, "max_length": self.context}
        texts = self.processor.tokenizer(prompts, return_tensors="pt", **options).to(device)
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            clip: Any = self.clip.module
            image_features = clip.get_image_features(pixels["pixel_values"]).pooler_output
            text_features = clip.get_text_features(texts["input_ids"], texts["attention_mask"]).pooler_output
        self.add(100 * F.cosine_similarity(image_features, text_features))

    def compute(self) -> Tensor:
        """Return the mean, at least 0."""
        return super().compute().clamp(min=0)

    def identity(self) -> dict[str, Any]:
        """Return the identity of the metric and a digest of tokenizer and image processor."""
        return super().identity() | {"files": self.files}


def _digest(folder: Path) -> str:
    """Return 16 hex digits of a sha256 over the text files in ``folder``: sizes, tokenizer, image processor."""
    digest = sha256()
    for path in sorted([*folder.glob("*.json"), *folder.glob("merges.txt")]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _transformers() -> ModuleType:
    try:
        return import_module("transformers")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"a CLIP needs the package transformers ({error}): pip install 'lit-shortcut[text]'", name=error.name
        ) from error


def _load(address: str) -> tuple[Any, Any, Path]:
    transformers = _transformers()
    folder = local_folder(address, _FILES)
    if not folder.is_dir():
        raise WeightsError(
            f"{address}: no such folder; expected one that holds a CLIPModel (config.json, model.safetensors, "
            "tokenizer.json, preprocessor_config.json), or an address such as hf://openai/clip-vit-base-patch16"
        )
    local: dict[str, Any] = {"local_files_only": True}
    try:
        model, found = transformers.CLIPModel.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, **local
        )
        processor = transformers.CLIPProcessor.from_pretrained(folder, **local)
    except Exception as error:  # transformers raises errors of many types for a damaged folder
        raise WeightsError(f"{folder}: not a CLIPModel with tokenizer and image processor ({error})") from error
    if found["missing_keys"]:
        raise WeightsError(f"{folder}: not a CLIPModel; its weights lack {min(found['missing_keys'])}")
    return model, processor, folder
