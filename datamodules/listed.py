"""Conditions of images to generate, listed one by one: prompts or classes in turn, with consecutive seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from datamodules.conditions import InTurn, hash_of
from lit_shortcut.contracts import Conditions
from lit_shortcut.pictures import require_seeds


class Listed(InTurn):
    """``num_images`` images, prompts or labels in turn. Image i has seed ``seed`` + i and can be reproduced by it.

    Args:
        prompts: texts; empty if labels are given.
        labels: classes; empty if prompts are given.
        num_images: number of images to generate; None generates one for each prompt or label.
        batch_size: images per batch.
        seed: seed of the first image.

    Raises:
        ValueError: if there are neither prompts nor labels, or both; if a prompt is empty, or a seed outside 64 bits.
    """

    def __init__(
        self,
        prompts: Sequence[str] = (),
        labels: Sequence[int] = (),
        num_images: int | None = None,
        batch_size: int = 8,
        seed: int = 0,
    ) -> None:
        self.prompts, self.labels = tuple(prompts), tuple(labels)
        if bool(self.prompts) == bool(self.labels):
            raise ValueError(f"expected either prompts or labels, got {'both' if self.prompts else 'neither'}")
        if empty := [number for number, prompt in enumerate(self.prompts, start=1) if not prompt.strip()]:
            raise ValueError(f"prompt {empty[0]}: expected a text, found an empty one")
        self.prompts_sha256 = hash_of(self.prompts or self.labels)
        count = len(self.prompts) or len(self.labels)
        super().__init__(count if num_images is None else num_images, batch_size, seed, count)
        require_seeds([seed, seed + self.num_images - 1])

    def identity(self) -> dict[str, Any]:
        """Return JSON values that determine all conditions but their run seed."""
        return super().identity() | {"seeds": "consecutive"}

    def seed_of(self, run_seed: int, index: int) -> int:
        """Return ``run_seed`` + ``index``."""
        return run_seed + index

    def asked_for(self, conditions: Conditions) -> Conditions:
        """Return ``conditions`` with prompts or labels in turn."""
        turns = conditions.labels.tolist()
        if self.prompts:
            return conditions._replace(prompts=tuple(self.prompts[turn] for turn in turns))
        return conditions._replace(labels=torch.tensor([self.labels[turn] for turn in turns]))
