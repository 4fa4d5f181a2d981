"""Choice of precision: bfloat16 where it is fast, and never a precision that the device lacks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self, cast

import lightning as L
import torch
from lightning.pytorch.plugins.precision import HalfPrecision, MixedPrecision, Precision
from torch import Tensor, nn


def bfloat16_where_native() -> Precision:
    """Precision ``bf16-true`` if the device has instructions for it, else ``32-true``: an entry of trainer.plugins.

    A CPU without AVX-512-BF16 or AMX converts at every operation, several times slower than float32. Weights are cast
    once; ``bf16-mixed`` would cast those of a frozen network at every pass. To choose by hand, pass
    ``--trainer.plugins null --trainer.precision 32-true``.
    """
    return HalfPrecision("bf16-true") if has_native_bfloat16() else Precision()


def bfloat16_mixed_where_native() -> Precision:
    """Precision ``bf16-mixed``, to train in, if the device has instructions for bfloat16, else ``32-true``."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return MixedPrecision("bf16-mixed", device) if has_native_bfloat16() else Precision()


def has_native_bfloat16() -> bool:
    """Return whether the GPU, or the CPU if there is none, computes in bfloat16 without conversion."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def sampling_precision(trainer: L.Trainer) -> Precision:
    """Return the precision that a base is sampled in during ``fit``: the trainer's, or if that is mixed its half type.

    A frozen base has nothing to gain from float32 weights, which autocast would cast at every pass; published systems
    are tested in ``bf16-true`` and trained in ``bf16-mixed``.
    """
    name = str(trainer.precision)
    if not name.endswith("mixed"):
        return trainer.precision_plugin
    return HalfPrecision(cast(Any, name.replace("mixed", "true")))


@contextmanager
def float32_by_default() -> Iterator[None]:
    """Let tensors made without a dtype be float32; Lightning's ``bf16-true`` makes them bfloat16 during each step."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class KeptDtype(nn.Module):
    """A module that moves between devices but that no precision casts.

    Image decoders are of this kind, since their references decode in float32 and bfloat16 distinguishes few of 256
    shades, and so are sums over many batches.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def moved(tensor: Tensor) -> Tensor:
            found = fn(tensor)
            return found if found.dtype == tensor.dtype else tensor.to(found.device)

        applied: Self = super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        return applied


def require_same_device(plugin: Precision, device: torch.device) -> None:
    """Refuse an autocast of another device than ``device``: it would do nothing, and training would be in float32.

    Raises:
        ValueError: naming both devices.
    """
    if isinstance(plugin, MixedPrecision) and plugin.device != device.type:
        raise ValueError(
            f"trainer.plugins: {plugin.precision} was chosen for {plugin.device}, but the trainer runs on "
            f"{device.type}; pass --trainer.plugins null, and --trainer.precision by hand"
        )


def require_precision(precision: str, device: torch.device) -> None:
    """Refuse a ``precision``, by Lightning's name, that ``device`` lacks.

    Raises:
        ValueError: naming the precision, the device and what it has.
    """
    if precision.startswith("bf16") and device.type == "cuda" and not has_native_bfloat16():
        name = torch.cuda.get_device_name(device)
        raise ValueError(
            f"precision {precision}: {name} does not compute in bfloat16; take 32-true, or 16-mixed to fit"
        )
    if precision.startswith("16") and device.type == "cpu":
        raise ValueError(f"precision {precision}: a CPU does not compute in float16; take 32-true or bf16-true")
    if precision.startswith("64") and device.type == "mps":
        raise ValueError(f"precision {precision}: {device.type} does not compute in float64; take 32-true")
