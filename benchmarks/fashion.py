"""The embedded default, as ``configs/fashion`` sets it up."""

from __future__ import annotations

from pathlib import Path

from lit_shortcut.bases.maskgit.adapter import MaskGIT
from lit_shortcut.bases.maskgit.transformer import MaskGITTransformer
from lit_shortcut.fashion.tokenizer import FSQTokenizer
from lit_shortcut.sampling import Decoding

DECODING = Decoding(num_steps=8, guidance=1.5, confidence_noise=9.0)


def base() -> MaskGIT:
    """The shipped base; the working directory is the project's."""
    folder = Path("checkpoints/fashion")
    return MaskGIT(
        MaskGITTransformer.load(folder / "base.safetensors"), FSQTokenizer.load(folder / "tokenizer.safetensors")
    )
