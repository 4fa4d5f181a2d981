"""Lumina-DiMOO at its smallest, with random weights: for tests alone."""

from __future__ import annotations

import torch

from lit_shortcut.bases.dimoo.adapter import DiMOO
from lit_shortcut.bases.dimoo.llada import LLaDA
from lit_shortcut.bases.dimoo.prompt import SpecialTokens, Utf8Tokenizer
from lit_shortcut.networks.tokenizer import FSQTokenizer

SPECIAL = SpecialTokens(  # behind the 256 bytes
    mask=256, newline=257, boi=258, eoi=259, answer_start=260, answer_end=261, uncondition=262, first_code=264
)
_CODES = 8


def toy_dimoo(grid: int = 4, width: int = 16, seed: int = 0) -> DiMOO:
    """Prompts in bytes, ``grid``² tokens of 8 codes, 2 pixels a side each; features are ``width`` wide."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vocab_size = SPECIAL.first_code + _CODES
        transformer = LLaDA(vocab_size, width, depth=2, num_heads=2, mlp_width=2 * width)
        decoder = FSQTokenizer(levels=[_CODES], width=8, image_size=2 * grid)
    return DiMOO(
        transformer,
        decoder,
        Utf8Tokenizer(SPECIAL.uncondition),
        special=SPECIAL,
        codebook_size=_CODES,
        height=2 * grid,
        width=2 * grid,
        patch_size=2,
        max_prompt_tokens=32,
        template="<{}>",
    )
