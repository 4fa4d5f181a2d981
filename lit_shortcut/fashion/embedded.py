"""Embedded default bases, loaded from their folders."""

from __future__ import annotations

from pathlib import Path

from lit_shortcut.bases.dimoo.adapter import DiMOO
from lit_shortcut.bases.dimoo.llada import LLaDA
from lit_shortcut.bases.dimoo.prompt import SpecialTokens, TextTokenizer
from lit_shortcut.bases.maskgit.adapter import MaskGIT
from lit_shortcut.bases.maskgit.transformer import MaskGITTransformer
from lit_shortcut.fashion.tokenizer import FSQTokenizer

_BASE, _TOKENIZER = "base.safetensors", "tokenizer.safetensors"

_SPECIAL = SpecialTokens(mask=0, newline=1, boi=2, eoi=3, answer_start=4, answer_end=5, uncondition=6, first_code=512)


def fashion(folder: str | Path) -> MaskGIT:
    """Return the class-conditional default in ``folder``.

    Raises:
        WeightsError: if a file is missing or damaged.
    """
    folder = Path(folder)
    return MaskGIT(MaskGITTransformer.load(folder / _BASE), FSQTokenizer.load(folder / _TOKENIZER))


def fashion_text(folder: str | Path, tokenizer: Path | None = None) -> DiMOO:
    """Return the text-to-image default in ``folder``.

    Args:
        folder: folder of the transformer and its text tokenizer.
        tokenizer: file of the image tokenizer; None takes that of the class-conditional default, in the sibling folder.

    Raises:
        WeightsError: if a file is missing or damaged.
    """
    folder = Path(folder)
    return DiMOO(
        LLaDA.load(folder / _BASE),
        FSQTokenizer.load(tokenizer or folder.parent / "fashion" / _TOKENIZER),
        TextTokenizer(folder / "tokenizer.json", _SPECIAL),
        special=_SPECIAL,
        codebook_size=64,
        height=28,
        width=28,
        patch_size=2,
        max_prompt_tokens=32,
        template="{}",
    )
