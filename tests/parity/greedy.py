"""Comparison of greedy runs with those of a reference implementation, token for token."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lit_shortcut.bases.maskgit.adapter import MaskGIT
from lit_shortcut.contracts import Step
from lit_shortcut.guidance import guide


def require_same_run(
    base: MaskGIT, steps: list[Step], golden: Mapping[str, Tensor], run: str, scale: Callable[[int], float]
) -> None:
    """Compare ``steps`` with ``greedy.<run>.…`` of ``golden``; ``scale`` is the guidance at a step."""
    parts = (golden[f"greedy.{run}.{what}"] for what in ("predicted", "still_masked"))
    for step, predicted, masked in zip(steps, *parts, strict=True):
        logits = guide(base.interface.logits(step.features), scale(step.state.clock.step))
        assert torch.equal(logits.argmax(-1), predicted)
        assert torch.equal(step.tokens == base.spec.mask_id, masked.bool())
    assert torch.equal(steps[-1].tokens, golden[f"greedy.{run}.tokens"])
