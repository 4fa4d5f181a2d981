"""Memory that computations take beside what was there before."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Bytes of the tensors that are made within it and alive, ``live``, and the most they have been, ``peak``.

    Works on every device, the meta device included, where nothing is allocated at all. Memory that an operation takes
    for itself while it runs is not seen.

    >>> with LiveMemory() as memory:
    ...     kept = torch.zeros(256, device="meta") + 1
    >>> memory.live, memory.peak
    (1024, 2048)
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch does not say what it takes
        self.live = self.peak = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run ``func`` and book the storages it made; those of its arguments, which views share, are booked or old."""
        kwargs = kwargs or {}
        seen = _storages((args, kwargs))
        made = func(*args, **kwargs)
        for key, storage in _storages(made).items():
            if key not in seen:
                self.live += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return made

    def _free(self, size: int) -> None:
        self.live -= size


def _storages(tree: object) -> dict[int, torch.UntypedStorage]:
    storages = (leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
    return {id(storage): storage for storage in storages}
