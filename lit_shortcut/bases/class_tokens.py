"""Class labels as token ids, branch by branch."""

from __future__ import annotations

import torch
from torch import Tensor


def class_tokens(labels: Tensor, num_classes: int, first_id: int, *, guided: bool) -> Tensor:
    """Token ids (G, B, 1) of class ``labels`` (B,): class k is ``first_id`` + k, the dropped class one past the last.

    Raises:
        ValueError: if a label lies outside 0..num_classes-1.
    """
    is_outside = (labels < 0) | (labels >= num_classes)
    if bool(is_outside.any()):
        raise ValueError(f"class labels must lie in 0..{num_classes - 1}; got {labels[is_outside].unique().tolist()}")
    classes = labels + first_id
    dropped = torch.full_like(classes, first_id + num_classes)
    return torch.stack([classes, dropped] if guided else [classes])[..., None]
