"""Lumina-DiMOO at its smallest, with random weights, for tests."""

from __future__ import annotations

from torch import Tensor, nn

from lit_shortcut.bases.dimoo.adapter import DiMOO
from lit_shortcut.bases.dimoo.llada import LLaDA
from lit_shortcut.bases.dimoo.prompt import SpecialTokens, Utf8Tokenizer
from lit_shortcut.bases.frozen import seeded
from lit_shortcut.bounds import require_at_least

SPECIAL = SpecialTokens(  # after the 256 bytes
    mask=256, newline=257, boi=258, eoi=259, answer_start=260, answer_end=261, uncondition=262, first_code=264
)
_CODES = 8


class GreyShades(nn.Module):
    """Decoder to images of ``grid``² squares of 2×2 pixels, the higher the code the lighter the square."""

    def __init__(self, grid: int) -> None:
        super().__init__()
        self.grid = grid

    def decode(self, tokens: Tensor) -> Tensor:
        """Images, uint8 (B, 3, H, W), of codes ``tokens`` (B, L)."""
        grey = (tokens * (255 / (_CODES - 1))).round().byte().unflatten(1, (1, self.grid, self.grid))
        return grey.repeat_interleave(2, 2).repeat_interleave(2, 3).expand(-1, 3, -1, -1)


def toy_dimoo(grid: int = 4, width: int = 16, seed: int = 0) -> DiMOO:
    """Prompts in bytes, ``grid``² tokens of 8 codes, 2 pixels a side each; features are ``width`` wide."""
    require_at_least(1, grid=grid, width=width)
    with seeded(seed):
        vocab_size = SPECIAL.first_code + _CODES
        transformer = LLaDA(vocab_size, width, depth=2, num_heads=2, mlp_width=2 * width)
    return DiMOO(
        transformer,
        GreyShades(grid),
        Utf8Tokenizer(SPECIAL.uncondition),
        special=SPECIAL,
        codebook_size=_CODES,
        height=2 * grid,
        width=2 * grid,
        patch_size=2,
        max_prompt_tokens=32,
        template="<{}>",
    )
