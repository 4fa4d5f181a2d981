"""Batches of an epoch in a fixed order, made ahead by threads and resumed where a checkpoint was saved."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import lightning as L
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.copying import CopyStream, begun_ahead
from lit_shortcut.background import Background
from lit_shortcut.contracts import Trajectories
from lit_shortcut.trajectory import TrajectoryError

Batch = TypeVar("Batch")


def epoch_of(module: L.LightningDataModule) -> int:
    """Return the epoch of ``module``'s trainer; 0 under ``overfit_batches``, where batches stay the same."""
    if not module.trainer or module.trainer.overfit_batches:  # type: ignore[attr-defined]  # Lightning sets it late
        return 0
    return module.trainer.current_epoch


class EpochLoader(Generic[Batch]):
    """``length`` batches per epoch; resumes where a checkpoint was saved, without reading earlier batches.

    Lightning saves and restores its state. It needs a length: without one Lightning fetches a batch ahead, and the
    saved state would be off by one.

    Batches are made ahead by threads. Reading, checksums and tensor arithmetic release Python's lock, and threads need
    no copies: a process would copy each batch into shared memory first, which took 2 to 3 times as long as reading it.

    Args:
        batches: item (epoch, number) is a batch, or None to skip it; several threads may request items at a time.
        length: batches in an epoch.
        epoch: returns the epoch's number; called when the epoch begins.
        layout: everything the order depends on, compared when a checkpoint is resumed.
        num_workers: threads, each at most two batches ahead, in pinned memory if there is a GPU and they are no
            trajectories; 0 makes each batch on demand.
        device: where the batches are used; if it is a GPU, each is copied there while the one before is in use.
    """

    def __init__(
        self,
        batches: Dataset[Batch | None],
        length: int,
        epoch: Callable[[], int] = lambda: 0,
        layout: dict[str, int | str] | None = None,
        num_workers: int = 0,
        device: torch.device | None = None,
    ) -> None:
        self._batches, self._length, self._epoch, self._layout = batches, length, epoch, layout or {}
        self._num_workers, self._device = num_workers, device
        self._position, self._resume = (0, 0), (0, 0)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        epoch = self._epoch()
        done = self._resume[1] if self._resume[0] == epoch else 0
        self._resume = (0, 0)
        places = [(epoch, number) for number in range(done, self._length)]
        made = self._made_ahead(places) if self._num_workers else map(self._batches.__getitem__, places)
        if self._device is not None and self._device.type == "cuda":
            copies = CopyStream(self._device)
            made = begun_ahead(made, copies.begin, copies.finish)
        for number, batch in enumerate(made, start=done + 1):
            self._position = (epoch, number)
            if batch is not None:
                yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch, the number of its finished batches, and the layout."""
        epoch, done = self._position
        return {"epoch": epoch, "done": done, "layout": self._layout}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from ``state`` at the next iteration.

        Raises:
            TrajectoryError: if the order of batches differs from when the checkpoint was saved.
        """
        saved = state["layout"]
        changes = [
            f"{name} was {saved.get(name)}, is {self._layout.get(name)}"
            for name in dict.fromkeys([*self._layout, *saved])
            if saved.get(name) != self._layout.get(name)
        ]
        if changes:
            raise TrajectoryError(f"the checkpoint's place among the batches is lost: {', '.join(changes)}")
        self._position = self._resume = (state["epoch"], state["done"])

    def _made(self, place: tuple[int, int]) -> Batch | None:
        """Return the batch at ``place``, in pinned memory if there is a GPU.

        Not whole trajectories: they take GB, which pinning rounds up to a power of 2, and go to the device by steps,
        each of which is gathered first.
        """
        batch = self._batches[place]
        if isinstance(batch, Trajectories) or not torch.cuda.is_available():
            return batch
        pinned: Batch | None = apply_to_collection(batch, Tensor, Tensor.pin_memory)
        return pinned

    def _made_ahead(self, places: Sequence[tuple[int, int]]) -> Iterator[Batch | None]:
        jobs: Background[Batch | None] = Background(self._num_workers)
        try:
            for place in places:
                jobs.submit(self._made, place)
                yield from jobs.results(leave=2 * self._num_workers - 1)
            yield from jobs.results()
        finally:
            jobs.close(cancel=True)
