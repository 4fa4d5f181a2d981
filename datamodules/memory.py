"""Memory of batches."""

from __future__ import annotations

from math import prod
from weakref import finalize

import numpy as np
import torch
from torch import Tensor


class Memory:
    """Memory of batches, used again as soon as no tensor holds it; threads may share it.

    The system clears new memory page by page, and glibc gives large buffers back to it after each use, those of threads
    whatever its settings: that took 1.5 to 2 times as long as reading a batch.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[np.ndarray]] = {}  # by size in bytes

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a tensor of any values."""
        free = self._free.setdefault(size := prod(shape) * dtype.itemsize, [])
        try:
            memory = free.pop()  # in one step for all threads
        except IndexError:
            memory = np.empty(size, np.uint8)
        lent = memory.view()  # held by the tensor's storage, and by those of its views
        finalize(lent, free.append, memory).atexit = False
        return torch.from_numpy(lent).view(dtype).view(shape)
