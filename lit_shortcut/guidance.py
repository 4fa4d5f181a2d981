"""Classifier-free guidance (arXiv 2207.12598, equation 6), of logits or of what a linear head makes them from."""

from __future__ import annotations

import torch
from torch import Tensor


def guide(logits: Tensor, scale: float | Tensor) -> Tensor:
    """Return (1 + w)·conditional − w·unconditional.

    ``logits`` (G, …, V), or features in front of a linear head, become (…, V); with only one branch ``scale`` w must
    be 0.

    Raises:
        ValueError: if ``scale`` is not 0 and there is no unconditional branch.
    """
    if logits.shape[0] == 1:
        if scale:
            raise ValueError(f"guidance of scale {scale} needs the unconditional branch, which was not computed")
        return logits[0]
    return torch.lerp(logits[1], logits[0], 1 + scale)


def guide_rows(features: Tensor, scale: float | Tensor, num_rows: int) -> Tensor:
    """Guide the first ``num_rows`` rows, the image's, of ``features`` (G, …, S, C); return (…, S, C).

    A linear head maps them to the guided logits. The other rows are the conditional branch's. What is equal in both
    branches stays as it is, whatever the ``scale``.
    """
    return torch.cat([guide(features[..., :num_rows, :], scale), features[0, ..., num_rows:, :]], dim=-2)
