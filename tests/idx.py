"""IDX files of images, LeCun's MNIST format."""

from __future__ import annotations

import struct
from pathlib import Path

import torch
from torch import Tensor


def idx(values: Tensor) -> bytes:
    """Two zero bytes, 8 for uint8, the rank, big-endian sizes, the values."""
    header = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    return header + values.numpy().tobytes()


def write_test_split(folder: Path, count: int) -> None:
    """Write ``count`` black test images in Fashion-MNIST's size, of classes 0, 1, 2, …"""
    folder.mkdir()
    (folder / "t10k-images-idx3-ubyte").write_bytes(idx(torch.zeros(count, 28, 28, dtype=torch.uint8)))
    (folder / "t10k-labels-idx1-ubyte").write_bytes(idx((torch.arange(count) % 10).byte()))
