"""Encodings: how features are stored on disk and sent to the device.

An encoding turns the features of a step, (S, C), into one or more tensors whose first dimension is S, each a member of
the shard, and back. To add one, subclass :class:`Encoding` and call :func:`register`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from math import isfinite

import torch
from torch import Tensor

Parts = dict[str, Tensor]
"""Tensors (…, S, …) of encoded features by the ending of their members' names."""
Kind = tuple[torch.dtype, tuple[int, ...]]
"""Dtype and shape of a tensor."""


class Encoding(ABC):
    """A way to store features, called ``name`` in YAML and card."""

    name: str

    @abstractmethod
    def members(self, num_rows: int, width: int) -> dict[str, Kind]:
        """Return, by ending, the kinds of the tensors that store a step of ``num_rows`` (S) rows of ``width`` (C)."""

    @abstractmethod
    def encode(self, features: Tensor) -> Parts:
        """Encode ``features`` (…, S, C)."""

    @abstractmethod
    def decode(self, parts: Parts) -> Tensor:
        """Return the features (…, S, C) that ``parts`` encode."""

    def check(self, parts: Parts) -> None:
        """Raise a :class:`ValueError` if ``parts`` decode to NaN or infinity."""
        for ending, part in parts.items():
            if part.dtype.is_floating_point:
                require_finite("features" if ending == "npy" else ending.removesuffix(".npy"), part)


class Plain(Encoding):
    """Floating-point numbers of one dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.name, self.dtype = str(dtype).removeprefix("torch."), dtype

    def members(self, num_rows: int, width: int) -> dict[str, Kind]:
        """One tensor, (S, C)."""
        return {"npy": (self.dtype, (num_rows, width))}

    def encode(self, features: Tensor) -> Parts:
        """Cast features to the dtype."""
        return {"npy": features.to(self.dtype)}

    def decode(self, parts: Parts) -> Tensor:
        """Return features in the stored dtype."""
        return parts["npy"]


class Int8(Encoding):
    """8-bit integers with a scale for each row.

    Each row (C values of one token at one step) is divided by its scale, its largest magnitude / 127, and rounded; the
    scale is kept in float32. No value is off by more than half a scale. A row takes C + 4 bytes, so one guidance branch
    at 15 × 1025 × 768 takes 11.9 MB instead of 47.2 in float32.

    >>> parts = Int8().encode(torch.tensor([[2.54, -1.0, 0.0]]))
    >>> parts["npy"].tolist(), round(parts["scales.npy"].item(), 6)
    ([[127, -50, 0]], 0.02)
    """

    name = "int8"
    _largest = 127

    def members(self, num_rows: int, width: int) -> dict[str, Kind]:
        """Integers (S, C) and scales (S,)."""
        return {"npy": (torch.int8, (num_rows, width)), "scales.npy": (torch.float32, (num_rows,))}

    def encode(self, features: Tensor) -> Parts:
        """Return rounded quotients and their scales."""
        features = features.float()
        scales = features.abs().amax(-1).div_(self._largest)
        scales.clamp_(min=torch.finfo(scales.dtype).tiny)  # a row of zeros must not divide by zero
        return {"npy": (features / scales[..., None]).round_().to(torch.int8), "scales.npy": scales}

    def decode(self, parts: Parts) -> Tensor:
        """Return features in float32."""
        return parts["npy"].float().mul_(parts["scales.npy"][..., None])


_KNOWN = (Int8(), Plain(torch.bfloat16), Plain(torch.float16), Plain(torch.float32))
ENCODINGS: dict[str, Encoding] = {encoding.name: encoding for encoding in _KNOWN}


def register(encoding: Encoding) -> None:
    """Add ``encoding`` to ``ENCODINGS`` under its name."""
    ENCODINGS[encoding.name] = encoding


def require_finite(name: str, values: Tensor) -> None:
    """Raise a :class:`ValueError` if ``values``, called ``name``, hold NaN or infinity."""
    if values.numel() and not all(isfinite(bound.item()) for bound in torch.aminmax(values)):  # faster than isfinite
        raise ValueError(f"{name}: expected finite {str(values.dtype).removeprefix('torch.')}, found NaN or infinity")
