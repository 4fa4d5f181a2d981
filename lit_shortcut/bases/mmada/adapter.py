"""MMaDA (Yang et al., arXiv 2505.15809) behind the base protocol: its prompts, and its images' places after them."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch

from lit_shortcut.bases.dimoo.llada import LLaDA
from lit_shortcut.bases.dimoo.prompt import PromptTokenizer
from lit_shortcut.bases.frozen import grid_of
from lit_shortcut.bases.prompted_llada import ImageTokens, PromptedLLaDA
from lit_shortcut.contracts import ImageDecoder


@dataclass(frozen=True)
class MMaDATokens:
    """Ids of the tokens that are not text; the defaults are the published ones.

    Args:
        bos: begins the text.
        eos: ends the text.
        first_code: id of code 0, from which the others follow; the length of the text tokenizer.
        mask: stands at unknown image places.
        t2i: first of the sequence; requests an image.
        soi: begins the image.
        eoi: ends the image.
    """

    bos: int = 126080
    eos: int = 126081
    first_code: int = 126349
    mask: int = 126336
    t2i: int = 126088
    soi: int = 126084
    eoi: int = 126085


class MMaDA(PromptedLLaDA):
    """A frozen MMaDA with its tokenizers.

    The sequence is t2i, bos, text, eos, soi, the image's tokens row by row, eoi. The reference pads it on the left;
    since places are relative and nothing attends to padding, that is left out.

    Args:
        transformer: the network that is accelerated.
        tokenizer: decodes image tokens to images.
        prompt_tokenizer: maps text to token ids.
        special: ids of the tokens that are not text.
        codebook_size: V.
        height: height of the images in pixels, a multiple of ``patch_size``.
        width: width of the images in pixels, a multiple of ``patch_size``.
        patch_size: side in pixels of the square that a token stands for.
        max_text_tokens: longest text, with t2i and bos; a longer one is cut before its eos.
        negative: prompt of the unconditional branch.

    Raises:
        ValueError: if height and width differ or are not a positive multiple of the patch size, ``max_text_tokens``
            leave no room for text, or a code or special token lies outside the vocabulary.
    """

    special: MMaDATokens

    def __init__(
        self,
        transformer: LLaDA,
        tokenizer: ImageDecoder,
        prompt_tokenizer: PromptTokenizer,
        *,
        special: MMaDATokens | None = None,
        codebook_size: int = 8192,
        height: int = 512,
        width: int = 512,
        patch_size: int = 16,
        max_text_tokens: int = 512,
        negative: str = "",
    ) -> None:
        if max_text_tokens < 3:
            raise ValueError(f"max_text_tokens must be at least 3, t2i, bos and a token of text; got {max_text_tokens}")
        if height != width:
            raise ValueError(f"height and width must be equal, as its image decoder expects; got {height} and {width}")
        special = special or MMaDATokens()
        grid = grid_of(height, width, patch_size)
        num_tokens = grid[0] * grid[1]
        image = ImageTokens(
            grid,
            codebook_size,
            special.first_code,
            special.mask,
            frame=torch.tensor([special.soi, special.eoi]),
            row_offsets=torch.tensor([*range(1, num_tokens + 1), 0, num_tokens + 1]),
        )
        super().__init__(
            transformer,
            tokenizer,
            prompt_tokenizer,
            special=special,
            image=image,
            max_prompt_tokens=max_text_tokens + 1,
            negative=negative,
        )
        self.max_text_tokens = max_text_tokens

    def identity(self) -> dict[str, Any]:
        """Identity of the base, with the longest text."""
        return super().identity() | {"max_text_tokens": self.max_text_tokens}

    def prompt_ids(self, prompt: str) -> list[int]:
        """Token ids of ``prompt`` between t2i, bos and eos; longer texts are cut with a warning, as the base does."""
        text = self.prompt_tokenizer.encode(prompt)
        if text[:1] != [self.special.bos]:  # some tokenizers add it
            text = [self.special.bos, *text]
        ids = [self.special.t2i, *text]
        if len(ids) > self.max_text_tokens:
            warnings.warn(
                f"prompt {prompt[:40]!r}… has {len(ids)} tokens, the base takes {self.max_text_tokens}: "
                "the rest is cut",
                stacklevel=2,
            )
        return [*ids[: self.max_text_tokens], self.special.eos]

    def unconditional_ids(self) -> list[int]:
        """Token ids of the negative prompt."""
        return self.prompt_ids(self.negative)
