"""Transformer of Halton-MaskGIT (Besnier et al., arXiv 2503.17076): the class modulates every layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_shortcut.bounds import require_at_least
from lit_shortcut.interface import TokenInterface
from lit_shortcut.networks.attention import attend, split_heads
from lit_shortcut.networks.llada import RMSNorm
from lit_shortcut.published import Names, filled, load_state

_EPS = 1e-5

NAMES = Names(
    [
        ("tok_emb.", "token_embedding."),
        ("pos_emb.", "position_embedding."),
        ("cls_emb.", "class_embedding."),
        ("reg_tokens.", "registers."),
        ("transformer.layers.#.mlp.1.", "layers.#.modulation.1."),
        ("transformer.layers.#.ln1.", "layers.#.attention_norm."),
        ("transformer.layers.#.attn.wq.", "layers.#.query."),
        ("transformer.layers.#.attn.wk.", "layers.#.key."),
        ("transformer.layers.#.attn.wv.", "layers.#.value."),
        ("transformer.layers.#.attn.wo.", "layers.#.attention_out."),
        ("transformer.layers.#.ln2.", "layers.#.mlp_norm."),
        ("transformer.layers.#.ff.w1.", "layers.#.gate."),
        ("transformer.layers.#.ff.w3.", "layers.#.up."),
        ("transformer.layers.#.ff.w2.", "layers.#.down."),
        ("last_norm.norm_final.bias", "last.bias"),
        ("last_norm.norm_final.", "last.norm."),
        ("last_norm.mlp.1.", "last.modulation.1."),
        ("head.bias", "head_bias"),
        ("head.weight", "head_weight"),
    ]
)
"""Names of tensors in the published checkpoints and ours."""


class Layer(nn.Module):
    """Self-attention, then SwiGLU, each shifted, scaled and gated by the class (adaLN, arXiv 2212.09748)."""

    def __init__(self, width: int, num_heads: int, mlp_width: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        heads_width = width // num_heads * num_heads  # below ``width`` if that is not a multiple of the heads
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.attention_norm = RMSNorm(width, _EPS)
        self.query, self.key, self.value = (nn.Linear(width, heads_width, bias=False) for _ in range(3))
        self.attention_out = nn.Linear(heads_width, width, bias=False)
        self.mlp_norm = RMSNorm(width, _EPS)
        self.gate, self.up = (nn.Linear(width, mlp_width, bias=False) for _ in range(2))
        self.down = nn.Linear(mlp_width, width, bias=False)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """(B, S, C) to (B, S, C) under ``condition`` (B, 1, C)."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.modulation(condition).chunk(6, dim=-1)
        normed = _modulate(self.attention_norm(x), shift, scale)
        # queries and keys are normalised over all heads together, before the split
        queries, keys = (F.rms_norm(p(normed), (p.out_features,), eps=_EPS) for p in (self.query, self.key))
        heads = (split_heads(part, self.num_heads) for part in (queries, keys, self.value(normed)))
        x = x + gate * self.attention_out(attend(*heads))
        normed = _modulate(self.mlp_norm(x), mlp_shift, mlp_scale)
        refined: Tensor = x + mlp_gate * self.down(F.silu(self.gate(normed)) * self.up(normed))
        return refined


class LastNorm(nn.Module):
    """RMS norm with a bias, shifted and scaled by the class."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = RMSNorm(width, _EPS)
        self.bias = nn.Parameter(torch.zeros(width))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """(B, S, C) to (B, S, C) under ``condition`` (B, 1, C)."""
        shift, scale = self.modulation(condition).chunk(2, dim=-1)
        return _modulate(self.norm(x) + self.bias, shift, scale)


class HaltonTransformer(nn.Module):
    """Transformer from image tokens and a class to features.

    The sequence is L = ``grid``² image tokens, row by row, then registers, which the features leave out: S = L. Codes
    are rows 0..V-1 of the token embedding, the mask is row V; the head's row for the mask is not used.

    Args:
        codebook_size: V, number of codes of the image tokenizer.
        num_classes: number of classes; the embedding has one more, the dropped class.
        grid: side of the square token grid.
        width: C, feature width.
        depth: transformer layers.
        num_heads: attention heads, each ``width // num_heads`` wide.
        mlp_width: hidden width of the SwiGLUs.
        num_registers: learned rows after the image tokens.
        is_tied: whether the head is the token embedding.
    """

    first_class_id = 0

    def __init__(
        self,
        codebook_size: int,
        num_classes: int,
        grid: int,
        width: int,
        depth: int,
        num_heads: int,
        mlp_width: int,
        num_registers: int = 1,
        is_tied: bool = True,
    ) -> None:
        super().__init__()
        require_at_least(1, codebook_size=codebook_size, num_classes=num_classes, grid=grid, width=width)
        require_at_least(1, depth=depth, num_heads=num_heads, mlp_width=mlp_width)
        require_at_least(0, num_registers=num_registers)
        self.hparams = {
            "codebook_size": codebook_size,
            "num_classes": num_classes,
            "grid": grid,
            "width": width,
            "depth": depth,
            "num_heads": num_heads,
            "mlp_width": mlp_width,
            "num_registers": num_registers,
            "is_tied": is_tied,
        }
        self.codebook_size, self.num_classes, self.width = codebook_size, num_classes, width
        self.num_tokens = self.sequence_length = grid * grid
        self.mask_id = codebook_size
        self.token_embedding = nn.Embedding(codebook_size + 1, width)
        self.position_embedding = nn.Embedding(self.num_tokens, width)
        self.class_embedding = nn.Embedding(num_classes + 1, width)
        self.registers = nn.Embedding(num_registers, width) if num_registers else None
        self.layers = nn.ModuleList(Layer(width, num_heads, mlp_width) for _ in range(depth))
        self.last = LastNorm(width)
        self.head_weight = None if is_tied else nn.Parameter(torch.randn(codebook_size + 1, width))
        self.head_bias = nn.Parameter(torch.zeros(codebook_size + 1))

    def forward(self, tokens: Tensor, class_ids: Tensor) -> Tensor:
        """Features (B, L, C) of image ``tokens`` (B, L) under ``class_ids`` (B,)."""
        condition = self.class_embedding(class_ids)[:, None]
        x = self.token_embedding(tokens) + self.position_embedding.weight
        if self.registers is not None:
            x = torch.cat([x, self.registers.weight.expand(len(x), -1, -1)], dim=1)
        for layer in self.layers:
            x = layer(x, condition)
        features: Tensor = self.last(x[:, : self.num_tokens], condition)
        return features

    def interface(self) -> TokenInterface:
        """The cheap ends, sharing this transformer's parameters: codes without the mask."""
        embedding = self.token_embedding.weight
        head = embedding if self.head_weight is None else self.head_weight
        return TokenInterface(
            num_tokens=self.num_tokens,
            code_embedding=embedding[: self.codebook_size],
            head_weight=head[: self.codebook_size],
            position_embedding=self.position_embedding.weight,
            head_bias=self.head_bias[: self.codebook_size],
        )

    @classmethod
    def load_published(cls, path: Path, **sizes: Any) -> HaltonTransformer:
        """Load the published checkpoint at ``path``, frozen; its weights are in memory only once.

        Args:
            path: ``.pth`` as published, or the safetensors file that :mod:`lit_shortcut.convert` made of it.
            **sizes: arguments of this class but ``is_tied``, which follows from the file's head and embedding.

        Raises:
            WeightsError: if the file is missing, damaged, or not of these sizes.
        """
        state = load_state(path)
        head, embedding = state.get("head.weight"), state.get("tok_emb.weight")
        is_tied = head is not None and embedding is not None and torch.equal(head, embedding)
        if is_tied:
            del state["head.weight"]
        return filled(lambda: cls(**sizes, is_tied=is_tied), state, NAMES, path)


def swiglu_width(width: int) -> int:
    """Hidden width of the published SwiGLUs: two thirds of 4 · ``width``, rounded up to a multiple of 256.

    >>> [swiglu_width(width) for width in (384, 512, 768, 1024, 1152)]
    [1024, 1536, 2048, 2816, 3072]
    """
    return -(-(2 * 4 * width // 3) // 256) * 256


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift
