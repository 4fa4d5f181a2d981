"""What data modules of transitions share, recorded or drawn online."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import lightning as L
import torch

from datamodules.windows import Order
from lit_shortcut.contracts import Trajectories
from lit_shortcut.sampling import Decoding
from lit_shortcut.trajectory import Card


class TransitionDataModule(L.LightningDataModule):
    """Parent of data modules that train on transitions and validate on whole trajectories.

    Subclasses set ``window``, ``max_gap``, ``guided`` and ``seed``.
    """

    window: int
    max_gap: int
    guided: bool
    seed: int

    @property
    @abstractmethod
    def card(self) -> Card:
        """Card of the set, or of what is drawn."""

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Leave whole trajectories on the host: validation moves them step by step."""
        if isinstance(batch, Trajectories):
            return batch
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def guidance(self) -> list[float] | None:
        """Return the scale of the guidance at each step, which guided transitions are made with; None for others."""
        return Decoding.from_values(self.card.decoding).guidance_by_step if self.guided else None

    def order_of(self, shards: int, samples_per_shard: int, group: int) -> Order:
        """Return the order of the transitions of ``shards``, of which ``group`` are mixed."""
        branches, starts = 1 if self.guided else self.card.branches, self.card.num_steps - self.window
        return Order(shards, samples_per_shard, branches, starts, group, self.seed, self.max_gap)

    def layout(self, **facts: int | str) -> dict[str, int | str]:
        """Return everything that the order depends on, ``facts`` of the subclass first."""
        own: dict[str, int | str] = {"window": self.window, "max_gap": self.max_gap, "seed": self.seed}
        return facts | own | ({"guided": 1} if self.guided else {})
