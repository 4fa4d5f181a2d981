"""Prediction by a linear combination of the last full steps' features, fitted in closed form on recorded ones.

As in L2P (arXiv 2604.26365), with one weight per past full step; the least-squares weights for any full steps and any
step to predict follow from inner products that are summed once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_shortcut.acceleration.accelerated import Past, PredictFn
from lit_shortcut.bounds import require_at_least
from lit_shortcut.contracts import BaseEnds, Context, State, Trajectories
from lit_shortcut.inputs import located
from lit_shortcut.interface import TokenInterface
from lit_shortcut.weights import WeightsError, fingerprint, load_tensors, save_tensors

_CHUNK = 2**24  # values of features on the device at a time
_RIDGE = 1e-6  # times the mean square, so that features that never change have weights, too


def inner_products(trajectories: Trajectories, interface: TokenInterface, device: torch.device) -> Tensor:
    """Sum inner products of recorded features over rows still masked.

    Entry [t, s, u] of the result (N, N, N), float64 on the CPU, sums f_s · f_u over the image rows that are masked
    before step t. Only a few rows at a time are moved to ``device``.
    """
    features = trajectories.features[:, :, :, : interface.num_rows]  # (B, G, N, rows, C)
    batch, branches, num_steps, num_rows, width = features.shape
    owner = interface.rows_of(torch.arange(interface.num_tokens, device=interface.code_embedding.device)).cpu()
    revealed_at = torch.zeros(batch, num_rows, dtype=torch.long).scatter_reduce(
        1, owner.expand(batch, -1), trajectories.committed_at.cpu().long(), "amax"
    )
    by_step = torch.zeros(num_steps, num_steps, num_steps, dtype=torch.float64)  # of rows committed at each step
    chunk = max(1, _CHUNK // (branches * num_steps * width))
    for sample, steps in zip(features, revealed_at, strict=True):
        for first in range(0, num_rows, chunk):
            rows = (
                sample[:, :, first : first + chunk].to(device).float().permute(2, 1, 0, 3).flatten(2)
            )  # (rows, N, G·C)
            products = (rows @ rows.mT).cpu().double()
            by_step.index_add_(0, steps[first : first + chunk], products)
    return by_step.flip(0).cumsum(0).flip(0)


def weights_for(products: Tensor, nodes: list[int], step: int) -> list[float]:
    """Return least-squares weights of the features at ``nodes`` for those at ``step``, over rows masked before it."""
    own = products[step]
    among, with_target = own[nodes][:, nodes], own[nodes, step]
    ridge = _RIDGE * among.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
    solved: list[float] = torch.linalg.solve(among + ridge * torch.eye(len(nodes)).double(), with_target).tolist()
    return solved


class Linear:
    """Weighted sum of the last full steps' features.

    Args:
        path: file of inner products, from ``callbacks/fit_linear.py``.
        memory: number of past full steps used, at least 1.

    Raises:
        ValueError: if the memory is below 1.
        WeightsError: if the file is missing, damaged, or not a file of inner products.
    """

    def __init__(self, path: Path, memory: int = 2) -> None:
        require_at_least(1, memory=memory)
        path = located(path)
        tensors, metadata = load_tensors(path)
        if set(tensors) != {"products"} or "base_fingerprint" not in metadata:
            raise WeightsError(f"{path}: expected inner products of recorded features, found {sorted(tensors)}")
        self.path, self.memory = path, memory
        self._products, self._base_fingerprint = tensors["products"], metadata["base_fingerprint"]

    def identity(self) -> dict[str, Any]:
        """Name with the memory, and the fingerprint of the inner products."""
        return {"method": f"linear {self.memory}", "weights": fingerprint({"products": self._products})}

    def start(self, base: BaseEnds, context: Context) -> PredictFn:
        """Predict from the full steps so far.

        Raises:
            WeightsError: if it was fitted on features of another base.
        """
        if base.fingerprint != self._base_fingerprint:
            raise WeightsError(
                f"{self.path}: fitted on base {self._base_fingerprint}, cannot accelerate base {base.fingerprint}"
            )
        return self._predict

    def _predict(self, past: Past, state: State) -> Tensor:
        if state.clock.num_steps != len(self._products):
            raise WeightsError(
                f"{self.path}: expected {len(self._products)} steps, as it was fitted on, got {state.clock.num_steps}"
            )
        return past.combined(weights_for(self._products, past.steps, state.clock.step))


def save(path: Path, products: Tensor, base_fingerprint: str) -> None:
    """Write :func:`inner_products` to ``path``."""
    save_tensors(path, {"products": products}, {"base_fingerprint": base_fingerprint})
