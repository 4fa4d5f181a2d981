"""Recorded trajectories of a random course: G = 2, N = 6, L = 9, S = 10, C = 6, V = 5."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lit_shortcut.acceleration.replay import RecordedEnds, Replay
from lit_shortcut.contracts import Conditions, Trajectories
from lit_shortcut.networks.shortcut import ShortcutNet
from tests.tiny_trajectories import SPEC, interface

COUNTS = [1, 1, 1, 2, 2, 2]
GUIDANCE = [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]
NUM_STEPS = len(COUNTS)
ENDS = RecordedEnds(SPEC, interface(), "0123456789abcdef")


def trajectories(path: Callable[[int], Tensor] | None = None, count: int = 5, seed: int = 0) -> Trajectories:
    """Features drift randomly, or are ``path`` (B, G, S, C) of the step."""
    generator = torch.Generator().manual_seed(seed)
    drift = torch.randn(count, 2, NUM_STEPS, 10, 6, generator=generator).cumsum(2)
    features = drift if path is None else torch.stack([path(step) for step in range(NUM_STEPS)], dim=2)
    steps = torch.arange(NUM_STEPS).repeat_interleave(torch.tensor(COUNTS))
    committed_at = torch.stack([steps[torch.randperm(9, generator=generator)] for _ in range(count)])
    column = torch.arange(count)
    return Trajectories(
        Conditions(column, column, column),
        features,
        torch.randint(5, (count, 9), generator=generator),
        committed_at,
    )


def replay(path: Callable[[int], Tensor] | None = None, count: int = 5, seed: int = 0) -> Replay:
    return Replay(ENDS, trajectories(path, count, seed), GUIDANCE)


def network(**options: object) -> ShortcutNet:
    """With random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        made = ShortcutNet(width=SPEC.width, num_heads=1, **options)  # type: ignore[arg-type]
        for parameter in made.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return made.eval().requires_grad_(False)
