"""Conditions of images that no base drew."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_shortcut.contracts import Conditions


def asked(labels: Tensor, prompts: tuple[str, ...] = ()) -> Conditions:
    """What images were made for; their ids and seeds say nothing."""
    return Conditions(torch.arange(len(labels)), torch.zeros(len(labels)).long(), labels, prompts)
