"""The smallest base, with random weights: for tests, and to copy when adding a base."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lit_shortcut.bases.class_tokens import ClassContext, class_context
from lit_shortcut.bases.frozen import seeded
from lit_shortcut.bounds import require_at_least
from lit_shortcut.contracts import Clock, Conditions, Context, TokenSpec
from lit_shortcut.interface import TokenInterface
from lit_shortcut.networks.attention import Attention
from lit_shortcut.weights import fingerprint


class ToyBase(nn.Module):
    """One attention layer over image tokens and a class token, with random weights; codes are shades of grey.

    Args:
        grid: side of the square token grid.
        codebook_size: V, shades of grey.
        num_classes: number of classes.
        width: C.
        seed: seed of the random weights.
    """

    def __init__(
        self, grid: int = 4, codebook_size: int = 8, num_classes: int = 10, width: int = 16, seed: int = 0
    ) -> None:
        super().__init__()
        require_at_least(1, grid=grid, num_classes=num_classes, width=width)
        require_at_least(2, codebook_size=codebook_size)  # black and white
        self.spec = TokenSpec(
            num_tokens=grid * grid,
            sequence_length=grid * grid + 1,
            width=width,
            codebook_size=codebook_size,
            mask_id=codebook_size,
            num_classes=num_classes,
        )
        self.grid = grid
        with seeded(seed):
            self.embedding = nn.Embedding(codebook_size + 1 + num_classes + 1, width)
            self.positions = nn.Parameter(torch.randn(grid * grid + 1, width))
            self.attention = Attention(width, num_heads=2)
            self.norm = nn.LayerNorm(width)
        codes = self.embedding.weight[:codebook_size].detach()
        self.interface = TokenInterface(grid * grid, codes, codes, self.positions[:-1].detach())
        self.fingerprint = fingerprint(self.state_dict())
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> ToyBase:
        """Stay in eval mode: a base is frozen."""
        return super().train(False)

    def identity(self) -> dict[str, Any]:
        """Class and fingerprint, which determine the images."""
        return {"class": type(self).__name__, "fingerprint": self.fingerprint}

    def context(self, conditions: Conditions, *, guided: bool) -> Context:
        """Class token ids; the last id is the dropped class.

        Raises:
            ValueError: if a label lies outside 0..num_classes-1.
        """
        return class_context(conditions, self.spec.num_classes, self.spec.mask_id + 1, guided=guided)

    def features(self, tokens: Tensor, context: Context, clock: Clock) -> Tensor:
        """Features (G, B, L + 1, C)."""
        assert isinstance(context, ClassContext)
        branches = len(context.ids)
        sequence = torch.cat([tokens.repeat(branches, 1), context.ids.flatten()[:, None]], dim=1)
        x = self.embedding(sequence) + self.positions
        x = self.norm(x + self.attention(x, x))
        return x.unflatten(0, (branches, -1))

    def decode(self, tokens: Tensor) -> Tensor:
        """Images, uint8 (B, 3, 2·grid, 2·grid): each code a square of its shade."""
        shades = (tokens * 255 // (self.spec.codebook_size - 1)).byte().unflatten(1, (self.grid, self.grid))
        return shades.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None].expand(-1, 3, -1, -1)
