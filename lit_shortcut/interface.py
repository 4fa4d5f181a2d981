"""The cheap ends of a base, kept beside the shards so that a shortcut is trained without the base."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TokenInterface(nn.Module):
    """Embedding of image tokens and the head that turns features into logits over the codebook.

    Letters: L image tokens, C width, V codebook. ``position_embedding`` and ``head_bias`` may be missing (a base with
    rotary positions, a head without bias). Nothing here is trained: the tensors are buffers, shared with the base that
    made them.

    Args:
        num_tokens: L; the first L rows of the features are the image tokens.
        code_embedding: (V, C), the base's own embedding of each code.
        head_weight: (V, C), rows of the base's head that belong to codes.
        position_embedding: (L, C) added to the embedding of a token at its place, or None.
        head_bias: (L, V) added to the logits at each place, or None.
    """

    code_embedding: Tensor
    head_weight: Tensor
    position_embedding: Tensor | None
    head_bias: Tensor | None

    def __init__(
        self,
        num_tokens: int,
        code_embedding: Tensor,
        head_weight: Tensor,
        position_embedding: Tensor | None = None,
        head_bias: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        self.register_buffer("code_embedding", code_embedding)
        self.register_buffer("head_weight", head_weight)
        self.register_buffer("position_embedding", position_embedding)
        self.register_buffer("head_bias", head_bias)

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Control tokens (B, K, C): embedding of codes ``tokens`` (B, K) at image ``positions`` (B, K)."""
        embedded = self.code_embedding[tokens]
        return embedded if self.position_embedding is None else embedded + self.position_embedding[positions]

    def logits(self, features: Tensor, positions: Tensor | None = None) -> Tensor:
        """Logits (..., B, M, V) of ``features`` (..., B, S, C), whose first L rows are the image tokens.

        ``positions`` (B, M) chooses image places; None takes all L of them. The head runs on those alone.
        """
        if positions is None:
            rows, bias = features[..., : self.num_tokens, :], self.head_bias
        else:
            index = positions[..., None].expand(*features.shape[:-2], -1, features.shape[-1])
            rows = torch.gather(features, -2, index)
            bias = None if self.head_bias is None else self.head_bias[positions]
        logits = rows @ self.head_weight.T.to(rows.dtype)
        return logits if bias is None else logits + bias
