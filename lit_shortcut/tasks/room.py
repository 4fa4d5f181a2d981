"""Room for the features of a batch while it is recorded: memory, or a file where they take too much of it."""

from __future__ import annotations

import os
import shutil
from math import prod
from pathlib import Path
from tempfile import NamedTemporaryFile

import torch
from torch import Tensor

from lit_shortcut.trajectory import TrajectoryError

_GB = 1e9


def room_like(tensor: Tensor, shape: tuple[int, ...], memory_limit_gb: float, scratch: Path) -> Tensor:
    """A tensor of ``shape`` and the dtype of ``tensor``, to be filled.

    Up to ``memory_limit_gb`` (10⁹ bytes) it lies where ``tensor`` does. A larger one lies on the CPU, mapped from a
    file in the folder ``scratch`` that has no name and goes with its last use, however the process ends: its pages are
    the system's to write out and to drop.

    Raises:
        TrajectoryError: if the file cannot be made, or the disk has too little space for it.
    """
    size = prod(shape) * tensor.dtype.itemsize
    if size <= memory_limit_gb * _GB:
        return tensor.new_empty(shape)
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(scratch).free
        if size > free:
            raise TrajectoryError(
                f"{scratch}: the features of a batch need {size / _GB:.3g} GB of scratch space, and the disk has "
                f"{free / _GB:.3g} GB free: record fewer images at once, or name a folder on another disk"
            )
        with NamedTemporaryFile(dir=scratch, prefix="features-") as file:
            if hasattr(os, "posix_fallocate"):  # a page that finds the disk full would end the process
                os.posix_fallocate(file.fileno(), 0, size)
            return torch.from_file(file.name, shared=True, size=prod(shape), dtype=tensor.dtype).view(shape)
    except OSError as error:
        raise TrajectoryError(
            f"{scratch}: no scratch file of {size / _GB:.3g} GB can be made ({error.strerror or error})"
        ) from error
