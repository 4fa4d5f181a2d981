"""Small CLIP (Radford et al., arXiv 2103.00020) from transformers' own classes, and its training on captions."""

from __future__ import annotations

import os
from collections.abc import Sequence
from math import log
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, PreTrainedTokenizerFast

from lit_shortcut.bounds import require_at_least
from lit_shortcut.images import CaptionedImages
from lit_shortcut.inputs import located
from lit_shortcut.tasks.optimized import OptimizedTask
from lit_shortcut.weights import WeightsError

BEGIN, END, PADDING = "<s>", "</s>", "<pad>"
"""Special tokens of a text; CLIP reads a text's features at its end token."""

_OTHER_POOLING = 2  # with this end token, CLIPModel reads a text's features at its highest token instead


class SmallCLIP(nn.Module):
    """Two transformers that embed images and texts in one space.

    :meth:`save` writes an ordinary CLIPModel, which loads without this class.

    Args:
        tokenizer: file of the tokenizers library with the special tokens ``<s>``, ``</s>``, ``<pad>``.
        image_size: H = W, in pixels; images of another size are scaled to it.
        patch_size: side of a patch in pixels.
        width: width of both transformers and of the space.
        depth: layers of each transformer.
        num_heads: attention heads of each transformer.
        context: longest text in tokens, begin and end included; longer ones are cut.

    Raises:
        WeightsError: if the tokenizer file is missing or damaged, or lacks a special token.
    """

    def __init__(
        self,
        tokenizer: str,
        image_size: int = 28,
        patch_size: int = 7,
        width: int = 96,
        depth: int = 3,
        num_heads: int = 3,
        context: int = 32,
    ) -> None:
        super().__init__()
        require_at_least(1, image_size=image_size, patch_size=patch_size, width=width, depth=depth, num_heads=num_heads)
        require_at_least(3, context=context)  # begin, a token, end
        self.hparams = {
            "tokenizer": tokenizer,
            "image_size": image_size,
            "patch_size": patch_size,
            "width": width,
            "depth": depth,
            "num_heads": num_heads,
            "context": context,
        }
        words = _words(located(tokenizer), context)
        sizes = {
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "projection_dim": width,
            "num_hidden_layers": depth,
            "num_attention_heads": num_heads,
        }
        special = {f"{name}_token_id": getattr(words, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        text = sizes | special | {"vocab_size": len(words), "max_position_embeddings": context}
        vision = sizes | {"image_size": image_size, "patch_size": patch_size}
        self.clip: Any = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=width))
        pixels = CLIPImageProcessor(
            size={"height": image_size, "width": image_size},
            do_center_crop=False,
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        )
        self.processor = CLIPProcessor(pixels, words)

    def similarities(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return cosines (B, P) between uint8 ``images`` (B, 1 or 3, H, W) and P ``prompts``."""
        pixels = self.processor.image_processor(images=images.expand(-1, 3, -1, -1), return_tensors="pt").pixel_values
        texts = self.processor.tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt")
        device = self.clip.device
        image_features = self.clip.get_image_features(pixels.to(device)).pooler_output
        text_features = self.clip.get_text_features(**texts.to(device)).pooler_output
        return F.normalize(image_features, dim=-1) @ F.normalize(text_features, dim=-1).T

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return logits (B, P): :meth:`similarities` times the learned scale."""
        return self.similarities(images, prompts) * self.clip.logit_scale.exp()

    def save(self, folder: Path) -> Path:
        """Write config, weights, tokenizer and image processor into ``folder``; return the path of the weights."""
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}") as aside:
            self.clip.save_pretrained(aside)
            self.processor.save_pretrained(aside)
            for path in Path(aside).iterdir():
                os.replace(path, folder / path.name)
        return folder / "model.safetensors"


def _words(path: Path, context: int) -> Any:
    """Load the tokenizer at ``path`` and let it begin and end each text as CLIP needs."""
    try:
        tokenizer = Tokenizer.from_str(path.read_text())
    except FileNotFoundError as error:
        raise WeightsError(f"{path}: no such tokenizer file") from error
    except Exception as error:  # the library raises nothing narrower
        raise WeightsError(f"{path}: not a tokenizer file ({error})") from error
    ids = {token: tokenizer.token_to_id(token) for token in (BEGIN, END, PADDING)}
    missing = [token for token, id_ in ids.items() if id_ is None]
    if missing:
        raise WeightsError(f"{path}: expected a tokenizer with the special tokens {', '.join(ids)}; it lacks {missing}")
    if ids[END] == _OTHER_POOLING:
        raise WeightsError(f"{path}: {END} must not be token {_OTHER_POOLING}, which marks old configs in CLIPModel")
    special = [(token, ids[token]) for token in (BEGIN, END)]
    tokenizer.post_processor = TemplateProcessing(single=f"{BEGIN} $A {END}", special_tokens=special)
    names = {"bos_token": BEGIN, "eos_token": END, "pad_token": PADDING}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=context, **names)


_MOST = log(100)  # upper bound of the logarithm of the learned scale, as in the paper


def contrastive_loss(logits: Tensor, prompts: Sequence[str]) -> Tensor:
    """Return the symmetric cross-entropy of ``logits`` (B, B), image i by prompt j; pairs are on the diagonal.

    Equal prompts share their targets equally; if all prompts differ, this is the loss of arXiv 2103.00020, section 2.3.

    >>> float(contrastive_loss(torch.zeros(2, 2), ["a coat", "a bag"]).exp())
    2.0
    """
    number = {prompt: index for index, prompt in enumerate(dict.fromkeys(prompts))}
    groups = torch.tensor([number[prompt] for prompt in prompts], device=logits.device)
    is_equal = (groups[:, None] == groups).to(logits.dtype)
    targets = is_equal / is_equal.sum(1, keepdim=True)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


class ClipTask(OptimizedTask):
    """Contrastive training on pairs of image and caption; every other batch is mirrored.

    Validation and test log, besides the loss, ``class_accuracy``: share of images nearest to the prompt of their own
    class; and the mean score, 100 · cosine, of images with their own captions (``score``) and with their neighbours' in
    the batch (``score_shuffled``).

    Args:
        clip: the network to train.
        class_prompts: a prompt for each class, in the order of the labels.
        **optimization: optimiser and schedule, as :class:`~lit_shortcut.tasks.optimized.OptimizedTask` takes them.
    """

    network: SmallCLIP

    def __init__(
        self,
        clip: SmallCLIP,
        class_prompts: list[str],
        **optimization: Any,
    ) -> None:
        super().__init__(clip, **optimization)
        self.class_prompts = class_prompts
        self.accuracy = MulticlassAccuracy(len(class_prompts), average="micro")
        self.score, self.score_shuffled = MeanMetric(), MeanMetric()

    def training_step(self, batch: CaptionedImages, batch_idx: int) -> Tensor:
        """Return the contrastive loss of one batch."""
        pixels = batch.pixels.flip(-1) if batch_idx % 2 else batch.pixels
        loss = contrastive_loss(self.network(pixels, batch.prompts), batch.prompts)
        self.log("train/loss", loss)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: CaptionedImages, batch_idx: int) -> None:
        """Keep the scale at or below 100, as in the paper."""
        self.network.clip.logit_scale.data.clamp_(max=_MOST)

    def validation_step(self, batch: CaptionedImages, batch_idx: int) -> None:
        """Log the measures on held-out images."""
        self._measure("val", batch)

    def test_step(self, batch: CaptionedImages, batch_idx: int) -> None:
        """Log the measures on the test images."""
        self._measure("test", batch)

    def _measure(self, stage: str, batch: CaptionedImages) -> None:
        similarities = self.network.similarities(batch.pixels, batch.prompts)
        logits = similarities * self.network.clip.logit_scale.exp()
        self.accuracy(self.network.similarities(batch.pixels, self.class_prompts), batch.labels)
        self.score(100 * similarities.diagonal())
        self.score_shuffled(100 * similarities.roll(1, dims=1).diagonal())
        values: dict[str, Any] = {
            "loss": contrastive_loss(logits, batch.prompts),
            "class_accuracy": self.accuracy,
            "score": self.score,
            "score_shuffled": self.score_shuffled,
        }
        self.log_dict({f"{stage}/{name}": value for name, value in values.items()}, batch_size=len(batch.labels))
