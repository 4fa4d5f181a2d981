"""Real images and their tokenizers, for reference statistics and for training the embedded bases."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from lit_shortcut.contracts import ImageDecoder


class LabelledImages(NamedTuple):
    """Real images: ``pixels`` uint8 (B, 1 or 3, H, W) and class ``labels`` (B,)."""

    pixels: Tensor
    labels: Tensor


class CaptionedImages(NamedTuple):
    """:class:`LabelledImages` with a text for each, ``prompts`` (B)."""

    pixels: Tensor
    labels: Tensor
    prompts: tuple[str, ...]


class ImageTokenizer(ImageDecoder, Protocol):
    """Tokenizer from images to codes and back."""

    @property
    def codebook_size(self) -> int:
        """V, number of codes."""

    def encode(self, images: Tensor) -> Tensor:
        """Codes (B, L) of uint8 ``images`` (B, 1 or 3, H, W)."""
