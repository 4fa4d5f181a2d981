"""Influence of tokens just committed on the places around them: a convolution on the token grid."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class Neighbourhood(nn.Module):
    """Depthwise convolution of committed tokens placed on the grid, zero elsewhere.

    This project's addition to the published network. Features change most beside a token just committed (on the fashion
    base five to ten times as much as five places away), and attention learns nearness slowly: its weights sum to one
    even if nothing is near.

    Args:
        width: c, channels.
        grid: side of the square token grid.
        reach: places that a token reaches in each direction; the kernel's side is 2·reach + stride.
        stride: side in tokens of the square that a row of the features stands for.

    Raises:
        ValueError: if ``grid`` is below 1, or not a multiple of ``stride``.
    """

    def __init__(self, width: int, grid: int, reach: int, stride: int = 1) -> None:
        super().__init__()
        if grid < 1:
            raise ValueError(f"grid must be the side of the token grid if there is a reach, got {grid}")
        if stride < 1 or grid % stride:
            raise ValueError(f"stride must divide grid {grid}, got {stride}")
        self.grid = grid
        self.norm = nn.LayerNorm(width)  # embeddings of a base may be of any scale
        self.spread = nn.Conv2d(width, width, 2 * reach + stride, stride, padding=reach, groups=width)
        self.mix = nn.Linear(width, width)

    def forward(self, control: Tensor, positions: Tensor, is_real: Tensor | None) -> Tensor:
        """Map ``control`` (B, K, c) at ``positions`` (B, K) to rows (B, L / stride², c).

        ``is_real`` (B, K) is false where ``control`` is padding, None if there is no padding.
        """
        tokens: Tensor = self.norm(control)
        if is_real is not None:
            tokens = tokens * is_real[..., None]
        count, _, channels = tokens.shape
        laid = tokens.new_zeros(count, self.grid**2, channels)
        laid = laid.scatter_add(1, positions[..., None].expand_as(tokens), tokens)
        spread = self.spread(laid.transpose(1, 2).unflatten(2, (self.grid, self.grid))).flatten(2).transpose(1, 2)
        mixed: Tensor = self.mix(F.gelu(spread))
        return mixed
