"""A tiny random set of trajectories: G = 2, N = 4, L = 9, S = 10, C = 6, V = 5."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lit_shortcut.contracts import Conditions, TokenSpec, Trajectories, Transition
from lit_shortcut.interface import TokenInterface
from lit_shortcut.trajectory import FORMAT_VERSION, Card, write_shard
from lit_shortcut.trajectory.interface_file import interface_fingerprint, save_interface
from lit_shortcut.trajectory.transitions import select

SPEC = TokenSpec(num_tokens=9, sequence_length=10, width=6, codebook_size=5, mask_id=5, num_classes=10)


def interface() -> TokenInterface:
    generator = torch.Generator().manual_seed(0)
    return TokenInterface(9, *(torch.randn(*shape, generator=generator) for shape in ((5, 6), (5, 6), (9, 6), (9, 5))))


CARD = Card(
    format_version=FORMAT_VERSION,
    base={"class": "Tiny", "fingerprint": "0123456789abcdef"},
    interface=interface_fingerprint(interface()),
    spec=SPEC._asdict(),
    decoding={"num_steps": 4, "schedule": "arccos", "guidance": 2.5},
    branches=2,
    num_steps=4,
    precision="32-true",
    encoding="float32",
    text_rows=False,
    num_samples=11,
    samples_per_shard=3,
    seed=7,
    num_classes=10,
)


def card(**changes: Any) -> Card:
    return replace(CARD, **changes)


def trajectories(ids: list[int]) -> Trajectories:
    """Random, but a sample depends on its id alone, which is also the first value of all its features."""
    rows = []
    for i in ids:
        generator = torch.Generator().manual_seed(i)
        features = torch.randn(2, 4, 10, 6, generator=generator)
        features[..., 0] = i
        tokens = torch.randint(5, (9,), generator=generator)
        rows.append(
            (features, tokens, torch.tensor([0, 1, 1, 2, 2, 2, 3, 3, 3])[torch.randperm(9, generator=generator)])
        )
    column = torch.tensor(ids)
    return Trajectories(
        Conditions(column, column + 100, column % 10), *(torch.stack(part) for part in zip(*rows, strict=True))
    )


def write_set(folder: Path, **changes: Any) -> Card:
    made = card(**changes)
    made.write(folder)
    save_interface(folder, interface())
    for index in range(made.num_shards):
        write_shard(folder, index, trajectories(list(made.ids(index))), made)
    return made


def adopt(folder: Path, other: Card) -> Card:
    """Have the set in ``folder`` claim to be the one of card ``other``."""
    other.write(folder)
    for path in folder.glob("shard-*.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"card": other.digest}))
    return other


def transitions(recorded: Trajectories, window: int = 1) -> Transition:
    """All windows of ``window`` (R) steps in ``recorded``: B · G · (N − R), start by start within each branch."""
    count, branches, num_steps = recorded.features.shape[:3]
    places = [(b, g, s) for b in range(count) for g in range(branches) for s in range(num_steps - window)]
    return select(recorded, places, window)
