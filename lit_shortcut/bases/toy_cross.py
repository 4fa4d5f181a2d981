"""Toy base that sees its prompt by cross-attention, with random weights: prompts without rows in the features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from lit_shortcut.bases.frozen import seeded
from lit_shortcut.bounds import require_at_least
from lit_shortcut.contracts import Clock, Conditions, Context, TokenSpec, require_prompts
from lit_shortcut.interface import TokenInterface
from lit_shortcut.networks.attention import Attention
from lit_shortcut.weights import fingerprint

_BYTES = 256


@dataclass(frozen=True, kw_only=True)
class EncodedPrompts(Context):
    """Encoder states of the prompts, padded to the longest.

    Args:
        states: (G, B, P, C).
        is_real: (G, B, P), false at padding.
    """

    states: Tensor
    is_real: Tensor


class CrossToyBase(nn.Module):
    """Image tokens attend to their prompt's bytes, then to one another; codes are shades of grey.

    Args:
        grid: side of the square token grid.
        codebook_size: V, shades of grey.
        width: C.
        negative: prompt of the unconditional branch.
        seed: seed of the random weights.
    """

    def __init__(
        self, grid: int = 4, codebook_size: int = 8, width: int = 16, negative: str = "nothing", seed: int = 0
    ) -> None:
        super().__init__()
        require_at_least(1, grid=grid, width=width)
        require_at_least(2, codebook_size=codebook_size)  # black and white
        num_tokens = grid * grid
        self.spec = TokenSpec(num_tokens, num_tokens, width, codebook_size, codebook_size, num_classes=0)
        self.grid, self.negative = grid, negative
        with seeded(seed):
            self.embedding = nn.Embedding(codebook_size + 1, width)
            self.positions = nn.Parameter(torch.randn(num_tokens, width))
            self.encoder = nn.Sequential(nn.Embedding(_BYTES, width), nn.Linear(width, width), nn.GELU())
            self.cross, self.attention = Attention(width, num_heads=2), Attention(width, num_heads=2)
            self.norm = nn.LayerNorm(width)
        codes = self.embedding.weight[:codebook_size].detach()
        self.interface = TokenInterface(num_tokens, codes, codes, self.positions.detach())
        self.fingerprint = fingerprint(self.state_dict())
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> CrossToyBase:
        """Stay in eval mode: a base is frozen."""
        return super().train(False)

    def identity(self) -> dict[str, Any]:
        """Class, fingerprint and negative prompt."""
        return {"class": type(self).__name__, "fingerprint": self.fingerprint, "negative": self.negative}

    def context(self, conditions: Conditions, *, guided: bool) -> Context:
        """Encode the prompts once; raises ValueError if there is not one for each sample."""
        prompts = require_prompts(conditions)
        texts = [*prompts, *([self.negative] * len(prompts) if guided else [])]
        ids = [torch.tensor(list(text.encode()), device=self.positions.device) for text in texts]
        lengths = torch.tensor([len(one) for one in ids], device=self.positions.device)
        states = self.encoder(pad_sequence(ids, batch_first=True))
        is_real = torch.arange(states.shape[1], device=lengths.device) < lengths[:, None]
        shape = (-1, len(prompts))
        return EncodedPrompts(states=states.unflatten(0, shape), is_real=is_real.unflatten(0, shape))

    def features(self, tokens: Tensor, context: Context, clock: Clock) -> Tensor:
        """Features (G, B, L, C), both branches in one batch."""
        assert isinstance(context, EncodedPrompts)
        branches = len(context.states)
        x = (self.embedding(tokens) + self.positions).repeat(branches, 1, 1)
        x = x + self.cross(x, context.states.flatten(0, 1), context.is_real.flatten(0, 1))
        x = self.norm(x + self.attention(x, x))
        return x.unflatten(0, (branches, -1))

    def decode(self, tokens: Tensor) -> Tensor:
        """Images, uint8 (B, 3, 2·grid, 2·grid): each code a square of its shade."""
        shades = (tokens * 255 // (self.spec.codebook_size - 1)).byte().unflatten(1, (self.grid, self.grid))
        return shades.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None].expand(-1, 3, -1, -1)
