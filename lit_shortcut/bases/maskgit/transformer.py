"""Bidirectional transformer of MaskGIT, as published for ImageNet by Besnier and Chen (arXiv 2310.14400)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from lit_shortcut.bounds import require_at_least
from lit_shortcut.interface import TokenInterface
from lit_shortcut.networks.attention import Attention, feed_forward
from lit_shortcut.networks.deepening import deepened
from lit_shortcut.published import Names, filled, load_state
from lit_shortcut.weights import load_module

_OUTER_EPS = 1e-12  # in the layer norms of the first and last block; those inside the layers keep torch's 1e-5

NAMES = Names(
    [
        ("tok_emb.", "token_embedding."),
        ("pos_emb", "position_embedding"),
        ("bias", "head_bias"),
        ("first_layer.0.", "first.0."),
        ("first_layer.2.", "first.1."),  # the published block has dropout at 1 and 5
        ("first_layer.4.", "first.3."),
        ("first_layer.6.", "first.4."),
        ("last_layer.0.", "last.0."),
        ("last_layer.2.", "last.1."),
        ("last_layer.4.", "last.3."),
        ("transformer.layers.#.0.norm.", "layers.#.attention_norm."),
        ("transformer.layers.#.0.fn.mha.in_proj_", "layers.#.attention.in_proj."),
        ("transformer.layers.#.0.fn.mha.out_proj.", "layers.#.attention.out_proj."),
        ("transformer.layers.#.1.norm.", "layers.#.mlp_norm."),
        ("transformer.layers.#.1.fn.net.0.", "layers.#.mlp.0."),
        ("transformer.layers.#.1.fn.net.3.", "layers.#.mlp.2."),
    ]
)


class Layer(nn.Module):
    """Pre-norm transformer layer: self-attention, then MLP, each with a residual."""

    def __init__(self, width: int, num_heads: int, mlp_width: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, num_heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = feed_forward(width, mlp_width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, C) to (B, S, C)."""
        normed = self.attention_norm(x)
        x = x + self.attention(normed, normed)
        refined: Tensor = x + self.mlp(self.mlp_norm(x))
        return refined


class MaskGITTransformer(nn.Module):
    """Transformer from image tokens and a class to features.

    One embedding table serves codes (rows 0..V-1), the mask token (V), classes (V+1..) and the dropped class (last
    row). The sequence is L = ``grid``² image tokens, row by row, then the class token: S = L + 1. The head is tied to
    the embedding table, with a bias per place and code.

    Args:
        codebook_size: V, number of codes of the image tokenizer.
        num_classes: number of classes.
        grid: side of the square token grid.
        width: C, feature width.
        depth: transformer layers.
        num_heads: attention heads.
        mlp_width: hidden width of the MLPs.
    """

    def __init__(
        self, codebook_size: int, num_classes: int, grid: int, width: int, depth: int, num_heads: int, mlp_width: int
    ) -> None:
        super().__init__()
        require_at_least(1, codebook_size=codebook_size, num_classes=num_classes, grid=grid, width=width)
        require_at_least(1, depth=depth, num_heads=num_heads, mlp_width=mlp_width)
        self.hparams = {
            "codebook_size": codebook_size,
            "num_classes": num_classes,
            "grid": grid,
            "width": width,
            "depth": depth,
            "num_heads": num_heads,
            "mlp_width": mlp_width,
        }
        self.codebook_size, self.num_classes, self.width = codebook_size, num_classes, width
        self.num_tokens = grid * grid
        self.sequence_length = self.num_tokens + 1  # the last row belongs to the class token
        self.mask_id = codebook_size
        self.first_class_id = codebook_size + 1
        self.dropped_class_id = self.first_class_id + num_classes
        self.token_embedding = nn.Embedding(codebook_size + num_classes + 2, width)
        self.position_embedding = nn.Parameter(torch.zeros(self.num_tokens + 1, width))
        self.first = nn.Sequential(
            nn.LayerNorm(width, eps=_OUTER_EPS),
            nn.Linear(width, width),
            nn.GELU(),
            nn.LayerNorm(width, eps=_OUTER_EPS),
            nn.Linear(width, width),
        )
        self.layers = nn.ModuleList(Layer(width, num_heads, mlp_width) for _ in range(depth))
        self.last = nn.Sequential(
            nn.LayerNorm(width, eps=_OUTER_EPS),
            nn.Linear(width, width),
            nn.GELU(),
            nn.LayerNorm(width, eps=_OUTER_EPS),
        )
        self.head_bias = nn.Parameter(torch.zeros(self.num_tokens + 1, codebook_size + num_classes + 2))
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.position_embedding, std=0.02)

    def class_ids(self, labels: Tensor) -> Tensor:
        """Token ids of class ``labels`` (B,), as embedded after the image tokens."""
        return labels + self.first_class_id

    def forward(self, tokens: Tensor, class_ids: Tensor) -> Tensor:
        """Features (B, S, C), S = L + 1, of image ``tokens`` (B, L) under ``class_ids`` (B,)."""
        sequence = torch.cat([tokens, class_ids[:, None]], dim=1)
        x: Tensor = self.first(self.token_embedding(sequence) + self.position_embedding)
        for layer in self.layers:
            x = layer(x)
        features: Tensor = self.last(x)
        return features

    def interface(self) -> TokenInterface:
        """The cheap ends, sharing this transformer's parameters: only image rows and codebook columns."""
        codes = self.token_embedding.weight[: self.codebook_size]
        return TokenInterface(
            num_tokens=self.num_tokens,
            code_embedding=codes,
            head_weight=codes,
            position_embedding=self.position_embedding[: self.num_tokens],
            head_bias=self.head_bias[: self.num_tokens, : self.codebook_size],
        )

    @classmethod
    def load(cls, path: Path) -> MaskGITTransformer:
        """Load the frozen network at ``path``; raises :class:`~lit_shortcut.weights.WeightsError` if it fails."""
        return load_module(cls, path)

    @classmethod
    def load_deepened(cls, path: Path, depth: int) -> MaskGITTransformer:
        """Load the network at ``path`` and grow it to ``depth`` layers with the same features, to train further."""
        network = cls.load(path)
        network.layers = deepened(network.layers, depth, lambda layer: (layer.attention.out_proj, layer.mlp[-1]))
        network.hparams["depth"] = depth
        return network

    @classmethod
    def load_published(cls, path: Path, **sizes: int) -> MaskGITTransformer:
        """Load the published checkpoint at ``path``, frozen; its weights are in memory only once.

        Args:
            path: ``.pth`` as published, or the safetensors file that :mod:`lit_shortcut.convert` made of it.
            **sizes: arguments of this class.

        Raises:
            WeightsError: if the file is missing, damaged, or not of these sizes.
        """
        return filled(lambda: cls(**sizes), load_state(path), NAMES, path)
