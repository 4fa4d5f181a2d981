"""Lumina-DiMOO behind the base protocol: its prompts, and its images' places after them."""

from __future__ import annotations

from typing import Any

from lit_shortcut.bases.dimoo.llada import LLaDA
from lit_shortcut.bases.dimoo.prompt import TEMPLATE, UNCONDITION, Frame, PromptTokenizer, SpecialTokens
from lit_shortcut.bases.frozen import grid_of
from lit_shortcut.bases.prompted_llada import ImageTokens, PromptedLLaDA
from lit_shortcut.contracts import ImageDecoder


class DiMOO(PromptedLLaDA):
    """A frozen text-to-image LLaDA with its tokenizers.

    The image's tokens are framed by answer_start and boi, a newline after each row, eoi and answer_end.

    Args:
        transformer: the network that is accelerated.
        tokenizer: decodes image tokens to images.
        prompt_tokenizer: maps text to token ids.
        special: ids of the tokens that are not text.
        codebook_size: V.
        height: height of the images in pixels, a multiple of ``patch_size``.
        width: width of the images in pixels, a multiple of ``patch_size``.
        patch_size: side in pixels of the square that a token stands for.
        max_prompt_tokens: longest prompt in tokens, template included.
        template: text around a prompt, which replaces ``{}``. Special tokens are recognised here and in ``negative``;
            in a prompt they are plain text.
        negative: prompt of the unconditional branch.

    Raises:
        ValueError: if height or width is not a positive multiple of the patch size, a code or special token lies
            outside the vocabulary, the prompt tokenizer does not know ``<uncondition>`` by its id, or the negative
            prompt is too long.
    """

    special: SpecialTokens

    def __init__(
        self,
        transformer: LLaDA,
        tokenizer: ImageDecoder,
        prompt_tokenizer: PromptTokenizer,
        *,
        special: SpecialTokens | None = None,
        codebook_size: int = 8192,
        height: int = 1024,
        width: int = 1024,
        patch_size: int = 16,
        max_prompt_tokens: int = 512,
        template: str = TEMPLATE,
        negative: str = UNCONDITION,
    ) -> None:
        special = special or SpecialTokens()
        grid = grid_of(height, width, patch_size)
        frame = Frame(*grid)
        image = ImageTokens(
            grid, codebook_size, special.first_code, special.mask, frame.ids(special), frame.row_offsets()
        )
        super().__init__(
            transformer,
            tokenizer,
            prompt_tokenizer,
            special=special,
            image=image,
            max_prompt_tokens=max_prompt_tokens,
            negative=negative,
        )
        self.template = template
        known = prompt_tokenizer.encode("", UNCONDITION)
        if special.uncondition not in known:
            raise ValueError(
                f"the prompt tokenizer must know {UNCONDITION} as token {special.uncondition}, "
                f"but makes {known} of it: it belongs to another model"
            )
        self.unconditional_ids()  # raises if the negative prompt is too long

    def identity(self) -> dict[str, Any]:
        """Identity of the base, with the template."""
        return super().identity() | {"template": self.template}

    def prompt_ids(self, prompt: str) -> list[int]:
        """Token ids of ``prompt`` in the template; raises ValueError if there are too many."""
        return self._checked(self.prompt_tokenizer.encode(prompt, self.template), prompt)

    def unconditional_ids(self) -> list[int]:
        """Token ids of the negative prompt in the template."""
        whole = self.template.replace("{}", self.negative, 1)
        return self._checked(self.prompt_tokenizer.encode("", whole), self.negative)

    def _checked(self, ids: list[int], prompt: str) -> list[int]:
        if len(ids) > self.max_prompt_tokens:
            raise ValueError(
                f"expected prompts of at most {self.max_prompt_tokens} tokens, template included; "
                f"{prompt[:40]!r}… has {len(ids)}"
            )
        return ids
