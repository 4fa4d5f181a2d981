from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lit_shortcut.bases.amused import AMUSEd
from lit_shortcut.bases.dimoo.llada import LLaDA
from lit_shortcut.bases.dimoo.prompt import Utf8Tokenizer
from lit_shortcut.bases.halton.llamagen import llamagen_decoder
from lit_shortcut.bases.halton.transformer import HaltonTransformer
from lit_shortcut.bases.maskgit.adapter import MaskGIT
from lit_shortcut.bases.maskgit.vqgan import VQGAN
from lit_shortcut.bases.meissonic.adapter import Meissonic
from lit_shortcut.bases.mmada.adapter import MMaDA, MMaDATokens
from lit_shortcut.bases.mmada.magvit import magvit_decoder
from tests.published_amused import tiny_amused
from tests.published_meissonic import tiny_meissonic


@pytest.fixture(scope="session")
def make_base_with_vqgan(make_base: Callable[[int], MaskGIT]) -> Callable[[int], MaskGIT]:
    """The tiny random MaskGIT with a colour tokenizer."""
    vqgan = VQGAN(codebook_size=8, code_width=4, latent_width=4, width=32, multipliers=[1, 1], attention_levels=[])
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

    def make(seed: int) -> MaskGIT:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            transformer = HaltonTransformer(8, 5, grid=4, width=32, depth=2, num_heads=3, mlp_width=64)
            vq = llamagen_decoder(
                codebook_size=8, code_width=4, latent_width=4, width=32, multipliers=[1], num_blocks=[1]
            )
        return MaskGIT(transformer, vq)

    return make


@pytest.fixture(scope="session")
def make_mmada() -> Callable[[int], MMaDA]:
    """A tiny random MMaDA for each seed: 4×4 tokens of 8 codes, width 16, prompts in bytes."""
    special = MMaDATokens(mask=256, soi=257, eoi=258, t2i=259, bos=260, eos=261, first_code=264)

    def make(seed: int) -> MMaDA:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            transformer = LLaDA(280, width=16, depth=2, num_heads=2, mlp_width=32)
            vq = magvit_decoder(bits=3, width=32, multipliers=[1, 1], num_blocks=[2, 1])
        text = Utf8Tokenizer(uncondition=-1)
        return MMaDA(
            transformer, vq, text, special=special, codebook_size=8, height=8, width=8, patch_size=2, max_text_tokens=32
        )

    return make
