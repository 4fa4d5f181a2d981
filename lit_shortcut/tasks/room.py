"""Storage of a batch's features while it is recorded: beside the base, in the host's memory or in a file."""

from __future__ import annotations

import os
import shutil
from collections import deque
from concurrent.futures import Future
from itertools import cycle
from math import prod
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lit_shortcut.background import Background
from lit_shortcut.contracts import Trajectories
from lit_shortcut.trajectory import TrajectoryError

_GB = 1e9
_STEPS_AHEAD = 3  # steps whose features wait on the device to be copied
_BUFFERS, _BUFFER_BYTES = 4, 2**24  # of the ring; a buffer is large enough for a bus's full bandwidth


class Room:
    """Storage of features on the device that computes them."""

    def make(self, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return a tensor of ``shape`` and the dtype of ``like``, to be filled by :meth:`put`."""
        return like.new_empty(shape)

    def put(self, target: Tensor, source: Tensor) -> None:
        """Copy ``source`` to ``target``, contiguous and a part of what :meth:`make` returned."""
        target.copy_(source)


class HostRoom(Room):
    """Storage of features in the host's memory, or in a file if a batch takes too much of it.

    Args:
        memory_limit_gb: features of a batch that take more (10⁹ bytes) go to a file.
        scratch: folder of the files, on a disk. They have no name and vanish after their last use, however the process
            ends; the system writes out and drops their pages as it needs memory.
    """

    def __init__(self, memory_limit_gb: float, scratch: Path) -> None:
        self._limit, self._scratch, self._has_said = memory_limit_gb * _GB, scratch, False

    def make(self, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return a tensor of ``shape`` and the dtype of ``like``, to be filled by :meth:`put`.

        Raises:
            TrajectoryError: if the file cannot be made, or the disk has too little space for it.
        """
        size = prod(shape) * like.dtype.itemsize
        if size <= self._limit:
            return torch.empty(shape, dtype=like.dtype)
        if not self._has_said:
            self._has_said = True
            rank_zero_info(
                f"the features of a batch take {size / _GB:.3g} GB, more than memory_limit_gb: "
                f"{self._limit / _GB:.3g}; they go through files in {self._scratch}"
            )
        return _mapped(shape, like.dtype, self._scratch)

    def finished(self, trajectories: Trajectories) -> Future[Trajectories]:
        """Return a future of ``trajectories``, whose features were :meth:`put` here, all in the host's memory."""
        done: Future[Trajectories] = Future()
        done.set_result(apply_to_collection(trajectories, Tensor, Tensor.cpu))
        return done

    def close(self) -> None:
        """Wait for all copies."""


class HostRing(HostRoom):
    """A :class:`HostRoom` that a GPU fills while it computes: only a thread waits for copies.

    The thread copies features from the device on a stream of its own, piece by piece through a ring of pinned buffers.
    :meth:`put` waits only if the copies are ``_STEPS_AHEAD`` (3) steps behind.

    Memory, whatever the size of a batch: features of 3 steps on the device, G × B × S × C each, and 64 MiB of pinned
    memory for the ring on the host, beside the batches themselves.

    Args:
        device: the device that computes.
        memory_limit_gb: as in :class:`HostRoom`.
        scratch: as in :class:`HostRoom`.
    """

    def __init__(self, device: torch.device, memory_limit_gb: float, scratch: Path) -> None:
        super().__init__(memory_limit_gb, scratch)
        self._device, self._backend = device, torch.get_device_module(device)
        self._stream = self._backend.Stream(device)
        is_cuda = self._backend is torch.cuda
        self._waiting = {"blocking": True} if is_cuda else {}  # the thread sleeps instead of spinning
        self._ring = [torch.empty(_BUFFER_BYTES, dtype=torch.uint8, pin_memory=is_cuda) for _ in range(_BUFFERS)]
        self._jobs: Background[Any] = Background()
        self._copies: list[Future[None]] = []  # of the batch being recorded

    def put(self, target: Tensor, source: Tensor) -> None:
        """Queue a copy of ``source``, which must not change any more, to ``target``.

        Raises:
            RuntimeError: if an earlier copy failed.
        """
        deque(self._jobs.results(leave=_STEPS_AHEAD - 1), maxlen=0)
        self._copies.append(self._jobs.submit(self._copy, target, source, self._event()))

    def finished(self, trajectories: Trajectories) -> Future[Trajectories]:
        """Return a future of ``trajectories``, whose features were :meth:`put` here, all in the host's memory."""
        copies, self._copies = self._copies, []
        return self._jobs.submit(self._finish, trajectories, self._event(), copies)

    def close(self) -> None:
        """Wait for all copies; raise the error of any that failed."""
        try:
            deque(self._jobs.results(), maxlen=0)
        finally:
            self._jobs.close()

    def _event(self) -> Any:
        """Return an event that the device reaches after all work queued so far on the current stream."""
        event = self._backend.Event(**self._waiting)
        event.record(self._backend.current_stream(self._device))
        return event

    @torch.inference_mode()
    def _copy(self, target: Tensor, source: Tensor, computed: Any) -> None:
        piece = len(self._ring[0]) // source.dtype.itemsize
        on_the_way: deque[tuple[Any, Tensor, Tensor]] = deque()
        with self._backend.stream(self._stream):
            self._stream.wait_event(computed)
            pieces = zip(source.reshape(-1).split(piece), target.view(-1).split(piece), strict=True)
            for buffer, (values, place) in zip(cycle(self._ring), pieces, strict=False):
                if len(on_the_way) == len(self._ring):
                    _land(*on_the_way.popleft())
                pinned = buffer.view(source.dtype)[: len(values)]
                pinned.copy_(values, non_blocking=True)
                on_the_way.append((self._event(), pinned, place))
            for one in on_the_way:
                _land(*one)

    @torch.inference_mode()
    def _finish(self, trajectories: Trajectories, computed: Any, copies: list[Future[None]]) -> Trajectories:
        for copy in copies:
            copy.result()
        with self._backend.stream(self._stream):
            self._stream.wait_event(computed)
            found: Trajectories = apply_to_collection(trajectories, Tensor, _without_waiting)
            self._event().synchronize()
        return found


def room_of(device: torch.device, memory_limit_gb: float, scratch: Path) -> HostRoom:
    """Return the room for features that ``device`` computes."""
    return HostRing(device, memory_limit_gb, scratch) if device.type == "cuda" else HostRoom(memory_limit_gb, scratch)


def _land(copied: Any, pinned: Tensor, place: Tensor) -> None:
    copied.synchronize()
    place.copy_(pinned)


def _without_waiting(tensor: Tensor) -> Tensor:
    return tensor.to("cpu", non_blocking=True)  # into pinned memory


def _mapped(shape: tuple[int, ...], dtype: torch.dtype, scratch: Path) -> Tensor:
    """Return a tensor mapped from a nameless file in ``scratch``; errors as in :meth:`HostRoom.make`."""
    size = prod(shape) * dtype.itemsize
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(scratch).free
        if size > free:
            raise TrajectoryError(
                f"{scratch}: the features of a batch need {size / _GB:.3g} GB of scratch space, and the disk has "
                f"{free / _GB:.3g} GB free: record fewer images at once, or name a folder on another disk"
            )
        with NamedTemporaryFile(dir=scratch, prefix="features-") as file:
            if hasattr(os, "posix_fallocate"):  # writing a page to a full disk would kill the process
                os.posix_fallocate(file.fileno(), 0, size)
            return torch.from_file(file.name, shared=True, size=prod(shape), dtype=dtype).view(shape)
    except OSError as error:
        raise TrajectoryError(
            f"{scratch}: cannot make a scratch file of {size / _GB:.3g} GB ({error.strerror or error})"
        ) from error
