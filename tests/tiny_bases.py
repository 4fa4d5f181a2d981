"""Tiny random bases for each seed, of classes whose modules have no toy of their own."""

from __future__ import annotations

import torch

from lit_shortcut.bases.dimoo.llada import LLaDA
from lit_shortcut.bases.dimoo.prompt import Utf8Tokenizer
from lit_shortcut.bases.halton.llamagen import llamagen_decoder
from lit_shortcut.bases.halton.transformer import HaltonTransformer
from lit_shortcut.bases.maskgit.adapter import MaskGIT
from lit_shortcut.bases.mmada.adapter import MMaDA, MMaDATokens
from lit_shortcut.bases.mmada.magvit import magvit_decoder

_MMADA_TOKENS = MMaDATokens(mask=256, soi=257, eoi=258, t2i=259, bos=260, eos=261, first_code=264)


def tiny_halton(seed: int = 0) -> MaskGIT:
    """A Halton-MaskGIT whose heads do not divide its width."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = HaltonTransformer(8, 5, grid=4, width=32, depth=2, num_heads=3, mlp_width=64)
        vq = llamagen_decoder(codebook_size=8, code_width=4, latent_width=4, width=32, multipliers=[1], num_blocks=[1])
    return MaskGIT(transformer, vq)


def tiny_mmada(seed: int = 0) -> MMaDA:
    """An MMaDA of 4×4 tokens of 8 codes, width 16, prompts in bytes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = LLaDA(280, width=16, depth=2, num_heads=2, mlp_width=32)
        vq = magvit_decoder(bits=3, width=32, multipliers=[1, 1], num_blocks=[2, 1])
    return MMaDA(
        transformer,
        vq,
        Utf8Tokenizer(uncondition=-1),
        special=_MMADA_TOKENS,
        codebook_size=8,
        height=8,
        width=8,
        patch_size=2,
        max_text_tokens=32,
    )
