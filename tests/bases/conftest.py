from __future__ import annotations

from collections.abc import Callable

import pytest

from lit_shortcut.bases.maskgit.adapter import MaskGIT
from lit_shortcut.bases.maskgit.vqgan import VQGAN


@pytest.fixture(scope="session")
def make_base_with_vqgan(make_base: Callable[[int], MaskGIT]) -> Callable[[int], MaskGIT]:
    """The tiny random MaskGIT with a colour tokenizer."""
    vqgan = VQGAN(codebook_size=8, code_width=4, latent_width=4, width=32, multipliers=[1, 1], attention_levels=[])
    return lambda seed: MaskGIT(make_base(seed).transformer, vqgan)
