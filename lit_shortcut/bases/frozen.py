"""Shared parts of frozen bases."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor, nn

from lit_shortcut.bounds import require_at_least
from lit_shortcut.contracts import ImageDecoder
from lit_shortcut.weights import fingerprint, network_fingerprint


class FrozenBase(nn.Module):
    """A frozen base; subclasses set ``spec`` and ``interface``, and implement ``context`` and ``features``.

    Args:
        transformer: the network that is accelerated.
        tokenizer: decodes image tokens to images.
    """

    label = ""
    """Beginning of the fingerprint: ``random-`` for weights that have learned nothing."""

    def __init__(self, transformer: Any, tokenizer: ImageDecoder) -> None:
        super().__init__()
        self.transformer, self.tokenizer = transformer, tokenizer
        self.eval().requires_grad_(False)

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the transformer's weights, after the label."""
        return self.label + self.weights_fingerprint

    @cached_property
    def weights_fingerprint(self) -> str:
        """Fingerprint of the transformer's weights, computed on first use, since it reads all of them."""
        return fingerprint(self.weights())

    def weights(self) -> dict[str, Tensor]:
        """Return the transformer's weights, head included."""
        weights: dict[str, Tensor] = self.transformer.state_dict()
        return weights

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode: a base is frozen."""
        return super().train(False)

    def identity(self) -> dict[str, Any]:
        """Return class and fingerprints of transformer and image decoder, and whatever subclasses add."""
        return {
            "class": type(self).__name__,
            "fingerprint": self.fingerprint,
            "decoder": network_fingerprint(self.tokenizer),
        }

    def decode(self, tokens: Tensor) -> Tensor:
        """Images, uint8 (B, 3, H, W), of codes ``tokens`` (B, L)."""
        return self.tokenizer.decode(tokens)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw random weights from ``seed``, on the CPU; what is drawn afterwards does not depend on them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def grid_of(height: int, width: int, patch_size: int) -> tuple[int, int]:
    """Height and width in tokens of images of ``height`` × ``width`` pixels.

    Raises:
        ValueError: if either is not a positive multiple of ``patch_size``.
    """
    require_at_least(1, patch_size=patch_size)
    for name, size in (("height", height), ("width", width)):
        if size < 1 or size % patch_size:
            raise ValueError(f"{name} must be a positive multiple of {patch_size} pixels, got {size}")
    return height // patch_size, width // patch_size
