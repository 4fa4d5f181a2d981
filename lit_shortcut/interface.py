"""The cheap ends of a base, kept beside the shards so that a shortcut is trained without the base."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn


class Places(NamedTuple):
    """Where control tokens, ``control`` (B, K), and rows of the features, ``rows`` (B, S), stand in a base's sequence.

    Where rows have no place in one, ``rows`` is None and ``control`` are positions among the image tokens. ``is_real``
    (B, S) is false at rows that are padding, None where there is none.
    """

    rows: Tensor | None
    control: Tensor
    is_real: Tensor | None = None


class TokenInterface(nn.Module):
    """Embedding of image tokens and the head that turns features into logits over the codebook.

    Letters: L image tokens, S rows of the features, C width, V codebook. What a base has no need of is None (with
    rotary positions ``position_embedding``, else ``row_offsets``). Nothing here is trained: the tensors are buffers,
    shared with the base that made them until either is moved or cast.

    Args:
        num_tokens: L; the first L rows of the features are the image tokens.
        code_embedding: (V, C), the base's own embedding of each code.
        head_weight: (V, C), rows of the base's head that belong to codes.
        position_embedding: (L, C) added to the embedding of a token at its place, or None.
        head_bias: (V,) or (L, V), added to the logits at every or at each place, or None.
        row_offsets: (S − P,) for a base whose sequence begins with a prompt of P tokens: the first rows of its features
            are the image tokens, then what frames them; each stands so many places behind the prompt's end. The
            prompt's own rows come last. None where rows have no place in a sequence.
    """

    is_linear: ClassVar[bool] = True
    """Whether the head is linear but for its bias, so that guidance may come before it and the head run once."""

    code_embedding: Tensor
    head_weight: Tensor
    position_embedding: Tensor | None
    head_bias: Tensor | None
    row_offsets: Tensor | None

    def __init__(
        self,
        num_tokens: int,
        code_embedding: Tensor,
        head_weight: Tensor,
        position_embedding: Tensor | None = None,
        head_bias: Tensor | None = None,
        row_offsets: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        self.register_buffer("code_embedding", code_embedding)
        self.register_buffer("head_weight", head_weight)
        self.register_buffer("position_embedding", position_embedding)
        self.register_buffer("head_bias", head_bias)
        self.register_buffer("row_offsets", row_offsets)

    def row_places(self, prompt_lengths: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
        """Places (B, S) in the sequence of the first ``num_rows`` (S) rows, and which of them are no padding (B, S).

        ``prompt_lengths`` (B,) are P for each sample; rows behind a shorter prompt are padding. The answer lies on the
        interface's device.

        Raises:
            ValueError: if rows of this base have no place.
        """
        if self.row_offsets is None:
            raise ValueError("rows of this base's features have no place in a sequence")
        offsets, prompt_lengths = self.row_offsets, prompt_lengths.to(self.row_offsets.device)
        prompt = torch.arange(num_rows - len(offsets), device=offsets.device).expand(len(prompt_lengths), -1)
        places = torch.cat([prompt_lengths[:, None] + offsets, prompt], dim=1)
        rows = torch.arange(num_rows, device=offsets.device)
        return places, rows < len(offsets) + prompt_lengths[:, None]

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Control tokens (B, K, C): embedding of codes ``tokens`` (B, K) at image ``positions`` (B, K)."""
        embedded = self.code_embedding[tokens]
        return embedded if self.position_embedding is None else embedded + self.position_embedding[positions]

    def logits(self, features: Tensor, positions: Tensor | None = None) -> Tensor:
        """Logits (..., B, M, V) of ``features`` (..., B, S, C), whose first L rows are the image tokens.

        ``positions`` (B, M) chooses image places; None takes all L of them. The head runs on those alone.
        """
        if positions is None:
            logits = self._without_bias(features[..., : self.num_tokens, :])
            return logits if self.head_bias is None else logits + self.head_bias
        return self.row_logits(self.rows_at(features, positions), positions)

    def rows_at(self, features: Tensor, positions: Tensor) -> Tensor:
        """Rows (..., B, M, C) of ``features`` (..., B, S, C) at image ``positions`` (B, M)."""
        index = positions[..., None].expand(*features.shape[:-2], -1, features.shape[-1])
        return torch.gather(features, -2, index)

    def row_logits(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Logits (..., V) of ``rows`` (..., C) of the features, which stand at image ``positions`` (...)."""
        logits = self._without_bias(rows)
        if self.head_bias is None:
            return logits
        return logits + (self.head_bias if self.head_bias.dim() == 1 else self.head_bias[positions])

    def _without_bias(self, rows: Tensor) -> Tensor:
        return rows @ self.head_weight.T.to(rows.dtype)
