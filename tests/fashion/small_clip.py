"""A tiny random CLIP in transformers' own format, for tests."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from lit_shortcut.fashion.clip import SmallCLIP

SIZES = {"image_size": 8, "patch_size": 4, "width": 16, "depth": 1, "num_heads": 2, "context": 16}


def write_tokenizer(path: Path, special_tokens: tuple[str, ...] = ("<mask>", "<boi>", "<s>", "</s>", "<pad>")) -> Path:
    """A byte-level tokenizer file that knows ``special_tokens``."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=True)
    trainer = BpeTrainer(
        vocab_size=270,
        special_tokens=list(special_tokens),
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["a dark coat", "a bright coat"], trainer)
    tokenizer.save(str(path))
    return path


def write_clip(folder: Path, seed: int = 0, **sizes: int) -> Path:
    """A random CLIP of 8×8 images and texts of at most 16 tokens; returns ``folder``."""
    words = write_tokenizer(folder.with_name("words.json"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        clip = SmallCLIP(str(words), **{**SIZES, **sizes})
        for parameter in clip.parameters():
            parameter.data.normal_(std=0.3)  # far from alike for all images and texts
    clip.save(folder)
    return folder
