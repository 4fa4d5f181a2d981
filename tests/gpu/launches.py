"""What a device is asked to do, counted without one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
_FREE = {aten._unsafe_view.default, aten.alias.default, aten.detach.default, aten.empty.memory_format}
_FUSED_ON_DEVICES = {aten.rms_norm.default}  # made of parts on CPUs only
_READS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default}
_INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}


class Launches(TorchDispatchMode):
    """Operations that start something on a device, views apart, and those that wait for it.

    ``counts`` are by operation; ``reads`` are values read back and copies between devices, ``waits`` those of them that
    the host waits for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.reads: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def __torch_dispatch__(
        self, func: OpOverload, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace != "aten":  # questions about a tensor
            return func(*args, **kwargs)
        if func not in _FUSED_ON_DEVICES:  # inference mode hands operations over whole
            with self:
                decomposed = func.decompose(*args, **kwargs)
            if decomposed is not NotImplemented:
                return decomposed
        result = func(*args, **kwargs)
        crosses = func is aten._to_copy.default and isinstance(args[0], Tensor) and args[0].device != result.device
        crosses |= func is aten.copy_.default and args[0].device != args[1].device
        by_mask = func in _INDEXED and any(index is not None and index.dtype == torch.bool for index in args[1])
        crosses |= func in _INDEXED and any(index is not None and index.device != args[0].device for index in args[1])
        if func in _READS or crosses or by_mask:  # how many a mask chooses is a value, too
            self.reads[str(func)] += 1
            self.waits[str(func)] += not kwargs.get("non_blocking", False)
        if not func.is_view and func not in _FREE:
            self.counts[str(func)] += 1
        return result


def launches_of(run: Callable[[], object]) -> Launches:
    with Launches() as launches:
        run()
    return launches
