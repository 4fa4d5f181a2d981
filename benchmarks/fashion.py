"""The embedded default, as ``configs/fashion`` sets it up."""

from __future__ import annotations

from pathlib import Path

import yaml

from lit_shortcut.bases.maskgit.adapter import MaskGIT
from lit_shortcut.bases.maskgit.transformer import MaskGITTransformer
from lit_shortcut.fashion.tokenizer import FSQTokenizer
from lit_shortcut.sampling import Decoding


def decoding() -> Decoding:
    """How it draws tokens; the working directory is the project's."""
    return Decoding.from_values(yaml.safe_load(Path("configs/parts/fashion_decoding.yaml").read_text()))


def base() -> MaskGIT:
    """The shipped base; the working directory is the project's."""
    folder = Path("checkpoints/fashion")
    return MaskGIT(
        MaskGITTransformer.load(folder / "base.safetensors"), FSQTokenizer.load(folder / "tokenizer.safetensors")
    )
