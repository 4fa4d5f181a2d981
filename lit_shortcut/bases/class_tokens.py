"""Class labels as token ids, branch by branch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_shortcut.contracts import Conditions, Context


@dataclass(frozen=True, kw_only=True)
class ClassContext(Context):
    """Classes as token ids.

    Args:
        ids: (G, B).
    """

    ids: Tensor


def class_context(conditions: Conditions, num_classes: int, first_id: int, *, guided: bool) -> ClassContext:
    """Token ids of the labels of ``conditions``: class k is ``first_id`` + k, the dropped class one past the last.

    Only labels on the CPU are checked, which tasks do before they run anything; reading them on another device would
    synchronise it.

    Raises:
        ValueError: if a label on the CPU lies outside 0..num_classes-1.
    """
    labels = conditions.labels
    if labels.device.type == "cpu" and bool((is_outside := (labels < 0) | (labels >= num_classes)).any()):
        raise ValueError(f"class labels must lie in 0..{num_classes - 1}; got {labels[is_outside].unique().tolist()}")
    classes = labels + first_id
    dropped = torch.full_like(classes, first_id + num_classes)
    return ClassContext(ids=torch.stack([classes, dropped] if guided else [classes]))
