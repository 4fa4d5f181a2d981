"""Memory of batches."""

from __future__ import annotations

from math import prod
from weakref import finalize

import numpy as np
import torch
from torch import Tensor


class Memory:
    """Memory of batches, used again as soon as no tensor holds it; threads may share it.

    It keeps as many batches as were ever in use at a time. New memory is cleared by the system page by page, and glibc
    returns large buffers to the system whenever they are freed: clearing took longer than reading into them.
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
