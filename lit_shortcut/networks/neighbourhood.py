"""The token grid in a shortcut network: what committed tokens do to places around them, and places to each other."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_shortcut.networks.attention import feed_forward
from lit_shortcut.networks.rows import Rows


class Neighbourhood(nn.Module):
    """Depthwise convolution of committed tokens placed on the grid, zero elsewhere.

    This project's addition to the published network. Features change most beside a token just committed (on the fashion
    base five to ten times as much as five places away), and attention learns nearness slowly: its weights sum to one
    even if nothing is near. A token is taken together with the features at its place, since it changes the less the
    more it was expected there.

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
        self.features_norm = nn.LayerNorm(width)
        self.gate = nn.Linear(2 * width, 4 * width)
        self.pair = nn.Linear(2 * width, width)
        nn.init.zeros_(self.pair.weight)  # training begins without the pairs
        nn.init.zeros_(self.pair.bias)
        self.spread = nn.Conv2d(width, width, 2 * reach + stride, stride, padding=reach, groups=width)
        self.mix = nn.Linear(width, width)

    def forward(self, control: Tensor, features: Tensor, positions: Tensor, is_real: Tensor | None) -> Tensor:
        """Map ``control`` (B, K, c) at ``positions`` (B, K) to rows (B, L / stride², c).

        Args:
            control: embeddings of the tokens.
            features: (B, K, c), those at the places of the tokens.
            positions: places of the tokens on the grid.
            is_real: (B, K), false where ``control`` is padding; None if there is no padding.
        """
        tokens: Tensor = self.norm(control)
        both = torch.cat([tokens, self.features_norm(features)], dim=-1)
        gate, value = self.gate(both).chunk(2, dim=-1)
        tokens = tokens + self.pair(F.silu(gate) * value)
        if is_real is not None:
            tokens = tokens * is_real[..., None]
        count, _, channels = tokens.shape
        laid = tokens.new_zeros(count, self.grid**2, channels)
        laid = laid.scatter_add(1, positions[..., None].expand_as(tokens), tokens)
        mixed: Tensor = self.mix(F.gelu(on_grid(self.spread, laid, self.grid)))
        return mixed


class ConvBlock(nn.Module):
    """Depthwise convolution of the image's rows, norm, MLP, with a residual (ConvNeXt, arXiv 2201.03545).

    Training begins at the identity.

    Args:
        width: c, channels.
        side: side of the square grid of rows.
        reach: places that a row reaches in each direction.
    """

    def __init__(self, width: int, side: int, reach: int) -> None:
        super().__init__()
        self.side = side
        self.spread = nn.Conv2d(width, width, 2 * reach + 1, padding=reach, groups=width)
        self.norm, self.mlp = nn.LayerNorm(width), feed_forward(width, 4 * width)
        for parameter in self.mlp[2].parameters():
            nn.init.zeros_(parameter)

    def forward(self, own: Tensor, x: Tensor, rows: Rows) -> Tensor:
        """Map ``own``, ``rows`` of (B, S, c); the others are as in ``x`` (B, S, c), the image's first."""
        image = rows.put(x, own)[:, : self.side**2]
        near = F.pad(on_grid(self.spread, image, self.side), (0, 0, 0, x.shape[1] - image.shape[1]))
        refined: Tensor = own + self.mlp(self.norm(rows.take(near)))
        return refined


def on_grid(convolution: nn.Conv2d, laid: Tensor, side: int) -> Tensor:
    """Apply ``convolution`` to (B, side², c) laid on the grid; returns (B, rows, c)."""
    spread: Tensor = convolution(laid.transpose(1, 2).unflatten(2, (side, side)))
    return spread.flatten(2).transpose(1, 2)
