"""Growth of a trained transformer by layers that change nothing at first (Chen et al., Net2Net, arXiv 1511.05641)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any

from torch import nn


def deepened(layers: nn.ModuleList, depth: int, residual_ends: Callable[[Any], Iterable[nn.Module]]) -> nn.ModuleList:
    """Return ``layers`` with copies inserted evenly, ``depth`` in all, that compute the same function.

    Args:
        layers: residual layers, kept in order; each copy follows its original.
        depth: number of layers in the result.
        residual_ends: returns the last modules of a layer's residual branches, whose parameters are zero in copies.

    Raises:
        ValueError: if ``depth`` is below the number of layers.
    """
    if depth < len(layers):
        raise ValueError(f"depth must be at least {len(layers)}, the present number of layers; got {depth}")
    grown = []
    for index, layer in enumerate(layers):
        copies = depth * (index + 1) // len(layers) - depth * index // len(layers) - 1
        grown += [layer, *(_silent(layer, residual_ends) for _ in range(copies))]
    return nn.ModuleList(grown)


def _silent(layer: nn.Module, residual_ends: Callable[[Any], Iterable[nn.Module]]) -> nn.Module:
    copy = deepcopy(layer)
    for module in residual_ends(copy):
        for parameter in module.parameters():
            nn.init.zeros_(parameter)
    return copy
