"""Multi-head attention and feed-forward, the two parts of every transformer here."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Multi-head attention with biases and one packed input projection.

    The parameters are those of :class:`torch.nn.MultiheadAttention` under other names (``in_proj``, ``out_proj``), so
    published weights load by renaming; the computation is one fused kernel without the attention map.

    Raises:
        ValueError: if ``width`` is not a multiple of ``num_heads``.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"width must be a multiple of num_heads, got width {width} and num_heads {num_heads}")
        self.num_heads = num_heads
        self.in_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj.weight)
        nn.init.zeros_(self.in_proj.bias)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, query: Tensor, memory: Tensor, is_real: Tensor | None = None) -> Tensor:
        """Attend from ``query`` (B, Q, C) to ``memory`` (B, K, C), both projected here; returns (B, Q, C).

        ``is_real`` (B, K) is false where ``memory`` is padding. A row whose memory is all padding attends to nothing
        and gets the output projection's bias.
        """
        if query is memory:
            queries, keys, values = self.in_proj(query).chunk(3, dim=-1)
        else:
            width = query.shape[-1]
            weight, bias = self.in_proj.weight, self.in_proj.bias
            queries = F.linear(query, weight[:width], bias[:width])
            keys, values = F.linear(memory, weight[width:], bias[width:]).chunk(2, dim=-1)
        queries, keys, values = (split_heads(part, self.num_heads) for part in (queries, keys, values))
        mixed: Tensor = self.out_proj(attend(queries, keys, values, is_real))
        return mixed


def split_heads(packed: Tensor, num_heads: int) -> Tensor:
    """Split (B, S, C) into heads (B, heads, S, C / heads)."""
    return packed.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def attend(
    queries: Tensor, keys: Tensor, values: Tensor, is_real: Tensor | None = None, *, is_self: bool = False
) -> Tensor:
    """Return fused attention of heads (B, heads, Q or K, D), merged to (B, Q, C).

    ``is_real`` (B, K) is false where keys are padding. Attention to no keys, or only to padding, is 0; with ``is_self``
    rows attend to one another, and no sample may be only padding.
    """
    if not keys.shape[2]:
        nothing = torch.zeros_like(queries)
        if queries.requires_grad:  # DDP waits for a gradient of every parameter
            nothing = nothing + 0 * (queries.sum() + keys.sum() + values.sum())
        return nothing.transpose(1, 2).flatten(2)
    mask = None if is_real is None else is_real[:, None, None, :]
    heads = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
    if is_real is not None and not is_self:  # softmax over nothing is undefined, and kernels differ in its result
        heads = torch.where(is_real.any(dim=1)[:, None, None, None], heads, heads.new_zeros(()))
    return heads.transpose(1, 2).flatten(2)


def feed_forward(width: int, hidden_width: int) -> nn.Sequential:
    """Return linear, exact GELU, linear, from (..., C) to (..., C)."""
    return nn.Sequential(nn.Linear(width, hidden_width), nn.GELU(), nn.Linear(hidden_width, width))
