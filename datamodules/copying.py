"""Copies of batches to a GPU while it computes with the batch before."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

Batch = TypeVar("Batch")
Begun = TypeVar("Begun")


def begun_ahead(
    batches: Iterable[Batch], begin: Callable[[Batch], Begun], finish: Callable[[Begun], Batch]
) -> Iterator[Batch]:
    """Yield what ``finish`` makes of each batch, after the next one has been given to ``begin``."""
    before: list[Begun] = []
    for batch in batches:
        before.append(begin(batch))
        if len(before) > 1:
            yield finish(before.pop(0))
    for begun in before:
        yield finish(begun)


class CopyStream:
    """Copies to a GPU on a stream of its own: the device's copy engine works while its kernels do.

    Lightning copies a batch on the stream that computes, which then waits: at 50 GB/s, 4 ms for 64 pairs of
    MaskGIT-512 in bfloat16, whose training step takes 16 ms on an H200.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)

    def begin(self, batch: Batch) -> tuple[Batch, torch.cuda.Event]:
        """Return the tensors of ``batch``, from pinned memory, as they will be on the device, and when they are."""
        with torch.cuda.stream(self.stream):
            copies: Batch = apply_to_collection(batch, Tensor, lambda part: part.to(self.device, non_blocking=True))
            return copies, self.stream.record_event()

    def finish(self, begun: tuple[Batch, torch.cuda.Event]) -> Batch:
        """Return the tensors, for which the stream that computes waits, and which it may go on to use."""
        copies, event = begun
        computing = torch.cuda.current_stream(self.device)
        computing.wait_event(event)
        apply_to_collection(copies, Tensor, lambda part: part.record_stream(computing))
        return copies
