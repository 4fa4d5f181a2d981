from __future__ import annotations

from collections.abc import Callable

import pytest

from lit_shortcut.bases.amused import AMUSEd
from lit_shortcut.bases.maskgit.adapter import MaskGIT
from lit_shortcut.bases.maskgit.vqgan import VQGAN
from tests.published_amused import tiny_amused


@pytest.fixture(scope="session")
def make_base_with_vqgan(make_base: Callable[[int], MaskGIT]) -> Callable[[int], MaskGIT]:
    """The tiny random MaskGIT with a colour tokenizer."""
    vqgan = VQGAN(codebook_size=8, code_width=4, latent_width=4, width=32, multipliers=[1, 1], attention_levels=[])
    return lambda seed: MaskGIT(make_base(seed).transformer, vqgan)


@pytest.fixture(scope="session")
def make_amused() -> Callable[[int], AMUSEd]:
    """A tiny random aMUSEd for each seed: 4×4 tokens of 8 codes, width 32, prompts in bytes."""
    return tiny_amused
