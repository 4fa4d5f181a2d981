"""Fashion-MNIST with captions made from each image's class and measured attributes."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path

import torch
from jsonargparse import auto_cli
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from torch.utils.data import Dataset

from lit_shortcut.fashion.garments import caption, measure, true_attributes
from lit_shortcut.fashion.images import FashionMNIST
from lit_shortcut.images import CaptionedImages, LabelledImages

SPECIAL_TOKENS = (
    "<mask>",
    "<newline>",
    "<boi>",
    "<eoi>",
    "<answer_start>",
    "<answer_end>",
    "<uncondition>",
    "<s>",
    "</s>",
    "<pad>",
)
"""Ids 0, 1, … of the tokenizer that :func:`train_tokenizer` makes."""


class _Batches(Dataset[CaptionedImages]):
    """Batches by lists of indices; without ``seed`` captions are reworded each time, with it they stay the same."""

    def __init__(self, images: LabelledImages, seed: int | None) -> None:
        self.images, self.seed = images, seed
        values = measure(images.pixels)
        rows = zip(*(column.tolist() for column in values.values()), strict=True)
        self.true = [
            true_attributes(dict(zip(values, row, strict=True)), label)
            for row, label in zip(rows, images.labels.tolist(), strict=True)
        ]

    def __getitems__(self, indices: list[int]) -> CaptionedImages:
        chosen = torch.as_tensor(indices)
        labels: Tensor = self.images.labels[chosen]
        prompts = tuple(
            caption(label, self.true[index], self._rng(index))
            for index, label in zip(indices, labels.tolist(), strict=True)
        )
        return CaptionedImages(self.images.pixels[chosen], labels, prompts)

    def __len__(self) -> int:
        return len(self.true)

    def _rng(self, index: int) -> random.Random:
        drawn = int(torch.randint(2**62, ())) if self.seed is None else f"{self.seed}:{index}"
        return random.Random(drawn)  # noqa: S311 - wording, not a secret


class CaptionedFashionMNIST(FashionMNIST):
    """Fashion-MNIST with a caption for each image: its class and attributes.

    In training each caption is reworded every time; validation and test images always have the same one.

    Args:
        folder: folder of the four IDX files; None takes Debian's package or torchvision's download.
        batch_size: images per batch and rank.
        validation_images: number of the last training images, held out for validation.
        seed: seed of the wording of validation and test captions.
    """

    def __init__(
        self, folder: Path | None = None, batch_size: int = 64, validation_images: int = 2000, seed: int = 0
    ) -> None:
        super().__init__(folder, batch_size, validation_images)
        self.seed = seed

    def _batches(self, images: LabelledImages, *, shuffle: bool) -> _Batches:
        return _Batches(images, None if shuffle else self.seed)


def captions(images: LabelledImages, count: int, seed: int = 0) -> tuple[str, ...]:
    """Return captions of the first ``count`` of ``images``, worded by ``seed``."""
    first = LabelledImages(images.pixels[:count], images.labels[:count])
    return _Batches(first, seed).__getitems__(list(range(count))).prompts


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE on ``texts`` in lower case, with :data:`SPECIAL_TOKENS` first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def write_texts(folder: Path, vocab_size: int = 512, num_training: int = 1024, num_held_out: int = 2000) -> None:
    """Write ``tokenizer.json``, ``training_prompts.txt`` and ``held_out_prompts.txt`` to ``folder``.

    Training prompts are captions of training images, held-out ones of test images; the tokenizer is trained on captions
    of all training images.
    """
    images = FashionMNIST()
    train, test = images.split("train"), images.split("t10k")
    train_tokenizer(captions(train, len(train.labels)), vocab_size).save(str(folder / "tokenizer.json"))
    for name, source, count in (("training", train, num_training), ("held_out", test, num_held_out)):
        (folder / f"{name}_prompts.txt").write_text("\n".join(captions(source, count)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    auto_cli(write_texts)
