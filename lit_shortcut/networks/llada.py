"""Transformer block of LLaDA (Nie et al., arXiv 2502.09992), attending to its own rows or to others.

Submodules have the names of the published weights.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_shortcut.networks.attention import attend, split_heads


class Rotation(NamedTuple):
    """Rotation of rows in D/2 planes, float32 (B, 1, S, D), by angle φ in plane i.

    ``cos`` are cos φ in channels i and i + D/2, ``sin`` are −sin φ in channel i and sin φ in channel i + D/2.
    """

    cos: Tensor
    sin: Tensor


def rotation(places: Tensor, head_width: int, theta: float) -> Rotation:
    """Rotation of rows at ``places`` (B, S): by place · theta^(−2i/D) in plane i (Su et al., arXiv 2104.09864)."""
    exponents = torch.arange(0, head_width, 2, device=places.device).float() / head_width
    angles = places[:, None, :, None].float() * theta**-exponents
    cos, sin = angles.cos(), angles.sin()
    return Rotation(torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1))


def rotate(heads: Tensor, by: Rotation) -> Tensor:
    """Rotate ``heads`` (B, heads, S, D) in float32; plane i is spanned by channels i and i + D/2.

    >>> quarter = Rotation(torch.tensor([0.0, 0.0]), torch.tensor([-1.0, 1.0]))
    >>> rotate(torch.tensor([[[[1.0, 0.0]]]]), quarter)
    tensor([[[[0., 1.]]]])
    """
    single = heads.float()
    first, second = single.chunk(2, dim=-1)
    rotated = single * by.cos + torch.cat([second, first], dim=-1) * by.sin
    return rotated.to(heads.dtype)


class RMSNorm(nn.RMSNorm):
    """torch's RMS norm with the weight cast to the dtype of ``x``, as the fused kernel needs under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` (…, C) over C."""
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class LLaDABlock(nn.Module):
    """Pre-norm attention with rotary positions, then SwiGLU, each with a residual; no biases.

    Args:
        width: C.
        num_heads: attention heads.
        mlp_width: hidden width of the SwiGLU.
        norm_eps: eps of the RMS norms.

    Raises:
        ValueError: if ``width`` is not a multiple of twice ``num_heads``: channels are rotated in pairs.
    """

    def __init__(self, width: int, num_heads: int, mlp_width: int, norm_eps: float) -> None:
        super().__init__()
        if width % (2 * num_heads):
            raise ValueError(f"width must be a multiple of 2 · num_heads, got width {width} and num_heads {num_heads}")
        self.num_heads = num_heads
        self.attn_norm = RMSNorm(width, norm_eps)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.ff_norm = RMSNorm(width, norm_eps)
        self.ff_proj = nn.Linear(width, mlp_width, bias=False)
        self.up_proj = nn.Linear(width, mlp_width, bias=False)
        self.ff_out = nn.Linear(mlp_width, width, bias=False)

    def forward(
        self, x: Tensor, by: Rotation, is_real: Tensor | None = None, memory: tuple[Tensor, Rotation] | None = None
    ) -> Tensor:
        """Map (B, S, C) to (B, S, C).

        Args:
            x: rows, (B, S, C).
            by: rotation of their places.
            is_real: (B, S), or (B, K) with ``memory``, false at padding, which is not attended to; without ``memory``
                some rows of each sample must be real.
            memory: other rows (B, K, C) to attend to, with their rotation; the same norm applies to them.
        """
        normed = self.attn_norm(x)
        source, source_by = (normed, by) if memory is None else (self.attn_norm(memory[0]), memory[1])
        queries, keys, values = (
            split_heads(project(rows), self.num_heads)
            for project, rows in ((self.q_proj, normed), (self.k_proj, source), (self.v_proj, source))
        )
        queries, keys = rotate(queries, by), rotate(keys, source_by)
        x = x + self.attn_out(attend(queries, keys, values, is_real, is_self=memory is None))
        normed = self.ff_norm(x)
        refined: Tensor = x + self.ff_out(F.silu(self.ff_proj(normed)) * self.up_proj(normed))
        return refined
