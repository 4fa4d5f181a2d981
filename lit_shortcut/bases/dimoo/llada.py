"""Bidirectional transformer of LLaDA (Nie et al., arXiv 2502.09992), as Lumina-DiMOO uses it (arXiv 2510.06308)."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from lit_shortcut.bounds import require_above, require_at_least
from lit_shortcut.networks.deepening import deepened
from lit_shortcut.networks.llada import LLaDABlock, RMSNorm, Rotation, rotation
from lit_shortcut.weights import load_module


class LLaDA(nn.Module):
    """Transformer from token ids to features. Submodules have their published names without ``transformer.``.

    Args:
        vocab_size: rows of the embedding table, and of the head.
        width: C, feature width.
        depth: transformer blocks.
        num_heads: attention heads.
        mlp_width: hidden width of the SwiGLUs.
        rope_theta: base of the rotary frequencies.
        norm_eps: eps of the RMS norms.
        is_tied: whether the head is the embedding table.
    """

    def __init__(
        self,
        vocab_size: int,
        width: int,
        depth: int,
        num_heads: int,
        mlp_width: int,
        rope_theta: float = 500_000.0,
        norm_eps: float = 1e-5,
        is_tied: bool = False,
    ) -> None:
        super().__init__()
        require_at_least(1, vocab_size=vocab_size, width=width, depth=depth, num_heads=num_heads, mlp_width=mlp_width)
        require_above(0, rope_theta=rope_theta, norm_eps=norm_eps)
        self.hparams = {
            "vocab_size": vocab_size,
            "width": width,
            "depth": depth,
            "num_heads": num_heads,
            "mlp_width": mlp_width,
            "rope_theta": rope_theta,
            "norm_eps": norm_eps,
            "is_tied": is_tied,
        }
        self.head_width, self.rope_theta = width // num_heads, rope_theta
        self.wte = nn.Embedding(vocab_size, width)
        self.blocks = nn.ModuleList(LLaDABlock(width, num_heads, mlp_width, norm_eps) for _ in range(depth))
        self.ln_f = RMSNorm(width, norm_eps)
        self.ff_out = None if is_tied else nn.Linear(width, vocab_size, bias=False)

    @property
    def head_weight(self) -> Tensor:
        """(vocab_size, C); logits are features times its transpose."""
        return self.wte.weight if self.ff_out is None else self.ff_out.weight

    def rotation(self, places: Tensor) -> Rotation:
        """Rotation of tokens at ``places`` (B, S) in the sequence, for all passes with the same places."""
        return rotation(places, self.head_width, self.rope_theta)

    def forward(self, ids: Tensor, by: Rotation, is_real: Tensor | None = None) -> Tensor:
        """Features (B, S, C), output of the last norm, of token ``ids`` (B, S).

        Args:
            ids: token ids in any order, since each is rotated by its place.
            by: rotation of their places.
            is_real: (B, S), false at padding, which is never attended to.
        """
        x: Tensor = self.wte(ids)
        for block in self.blocks:
            x = block(x, by, is_real)
        features: Tensor = self.ln_f(x)
        return features

    @classmethod
    def load(cls, path: Path) -> LLaDA:
        """Load the frozen network at ``path``; raises :class:`~lit_shortcut.weights.WeightsError` if it fails."""
        return load_module(cls, path)

    @classmethod
    def load_deepened(cls, path: Path, depth: int) -> LLaDA:
        """Load the network at ``path`` and grow it to ``depth`` blocks with the same features, to train further."""
        network = cls.load(path)
        network.blocks = deepened(network.blocks, depth, lambda block: (block.attn_out, block.ff_out))
        network.hparams["depth"] = depth
        return network
