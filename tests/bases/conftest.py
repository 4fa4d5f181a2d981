from __future__ import annotations

from collections.abc import Callable

import pytest

from lit_shortcut.bases.amused import AMUSEd
from lit_shortcut.bases.maskgit.adapter import MaskGIT
from lit_shortcut.bases.maskgit.vqgan import vqgan_decoder
from lit_shortcut.bases.meissonic.adapter import Meissonic
from lit_shortcut.bases.mmada.adapter import MMaDA
from tests.published_amused import tiny_amused
from tests.published_meissonic import tiny_meissonic
from tests.tiny_bases import tiny_halton, tiny_mmada


@pytest.fixture(scope="session")
def make_base_with_vqgan(make_base: Callable[[int], MaskGIT]) -> Callable[[int], MaskGIT]:
    """The tiny random MaskGIT with a colour tokenizer."""
    small = {"codebook_size": 8, "code_width": 4, "latent_width": 4, "width": 32, "multipliers": [1, 1]}
    vqgan = vqgan_decoder(**small, num_blocks=[3, 3], attention_levels=[])
    return lambda seed: MaskGIT(make_base(seed).transformer, vqgan)


@pytest.fixture(scope="session")
def make_amused() -> Callable[[int], AMUSEd]:
    """A tiny random aMUSEd for each seed: 4×4 tokens of 8 codes, width 32, prompts in bytes."""
    return tiny_amused


@pytest.fixture(scope="session")
def make_meissonic() -> Callable[[int], Meissonic]:
    """A tiny random Meissonic for each seed: 4×4 tokens of 8 codes in 2×2 rows, width 24, prompts in bytes."""
    return lambda seed: tiny_meissonic(seed, 64, downsample=True, upsample=True)


@pytest.fixture(scope="session")
def make_monetico() -> Callable[[int], Meissonic]:
    """The same without resampling: as many rows as tokens."""
    return tiny_meissonic


@pytest.fixture(scope="session")
def make_halton() -> Callable[[int], MaskGIT]:
    """A tiny random Halton-MaskGIT for each seed, whose heads do not divide its width."""
    return tiny_halton


@pytest.fixture(scope="session")
def make_mmada() -> Callable[[int], MMaDA]:
    """A tiny random MMaDA for each seed: 4×4 tokens of 8 codes, width 16, prompts in bytes."""
    return tiny_mmada
