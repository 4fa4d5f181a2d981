"""Fashion-MNIST, the images of the embedded default."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import lightning as L
import torch
import torchvision
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lit_shortcut.images import LabelledImages

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package dataset-fashion-mnist
_IDX_UINT8 = 0x08


def read_idx(path: Path) -> Tensor:
    """The uint8 tensor in the IDX file ``path``, gzipped or not (LeCun's MNIST format).

    Raises:
        ValueError: if the file is missing, truncated or of another kind; the message names it.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        zero, kind, rank = struct.unpack_from(">HBB", content)
        shape = struct.unpack_from(f">{rank}I", content, 4)
    except (OSError, EOFError, zlib.error, struct.error) as error:
        raise ValueError(f"{path}: not a readable IDX file ({error})") from error
    values = bytearray(content[4 + 4 * rank :])
    if zero != 0 or kind != _IDX_UINT8 or not values or len(values) != math.prod(shape):
        raise ValueError(f"{path}: expected an IDX file of uint8 with shape {shape}, found {len(values)} bytes")
    return torch.frombuffer(values, dtype=torch.uint8).view(shape)


class _Batches(Dataset[LabelledImages]):
    """Item = a batch, chosen by a list of indices, so that collation is one indexing operation."""

    def __init__(self, pixels: Tensor, labels: Tensor) -> None:
        self.pixels, self.labels = pixels, labels

    def __getitem__(self, indices: list[int]) -> LabelledImages:
        chosen = torch.as_tensor(indices)
        return LabelledImages(self.pixels[chosen], self.labels[chosen])

    def __len__(self) -> int:
        return len(self.labels)


class FashionMNIST(L.LightningDataModule):
    """Fashion-MNIST (Xiao et al., arXiv 1708.07747): 60,000 training and 10,000 test images, 28×28, 10 classes.

    Args:
        folder: holds the four IDX files. None takes Debian's package ``dataset-fashion-mnist`` where it is installed,
            else torchvision's download into ``data/``.
        batch_size: images per batch and rank.
        validation_images: the last training images, kept aside for validation.
    """

    def __init__(self, folder: Path | None = None, batch_size: int = 64, validation_images: int = 2000) -> None:
        super().__init__()
        self.folder, self.batch_size, self.validation_images = folder, batch_size, validation_images

    def prepare_data(self) -> None:
        """Download once, on one rank, where neither a folder is given nor Debian's package installed."""
        if self.folder is None and not DEBIAN_FOLDER.is_dir():
            torchvision.datasets.FashionMNIST("data", download=True)

    def split(self, name: str) -> LabelledImages:
        """All images of split ``name``, ``train`` or ``t10k`` (test).

        Raises:
            ValueError: if a file is missing or damaged, or there are more labels than images or fewer.
        """
        folder = self.folder or (DEBIAN_FOLDER if DEBIAN_FOLDER.is_dir() else Path("data/FashionMNIST/raw"))
        pixels, labels = (
            read_idx(next((p for p in (folder / f"{stem}.gz", folder / stem) if p.exists()), folder / stem))
            for stem in (f"{name}-images-idx3-ubyte", f"{name}-labels-idx1-ubyte")
        )
        if len(pixels) != len(labels):
            raise ValueError(f"{folder}: {len(pixels)} images but {len(labels)} labels in split {name!r}")
        return LabelledImages(pixels[:, None], labels.long())

    def train_dataloader(self) -> DataLoader[LabelledImages]:
        """Training images, shuffled anew each epoch."""
        return self._loader(self._parts()[0], shuffle=True)

    def val_dataloader(self) -> DataLoader[LabelledImages]:
        """The training images kept aside."""
        return self._loader(self._parts()[1], shuffle=False)

    def test_dataloader(self) -> DataLoader[LabelledImages]:
        """The 10,000 test images."""
        return self._loader(self.split("t10k"), shuffle=False)

    def predict_dataloader(self) -> DataLoader[LabelledImages]:
        """The 10,000 test images, for reference statistics."""
        return self.test_dataloader()

    def _parts(self) -> tuple[LabelledImages, LabelledImages]:
        """Training images, and those kept aside."""
        images = self.split("train")
        kept = len(images.labels) - self.validation_images
        if not 0 < kept < len(images.labels):
            raise ValueError(
                f"validation_images must lie in 1..{len(images.labels) - 1}, below the number of training images; "
                f"got {self.validation_images}"
            )
        return (
            LabelledImages(images.pixels[:kept], images.labels[:kept]),
            LabelledImages(images.pixels[kept:], images.labels[kept:]),
        )

    def _loader(self, images: LabelledImages, *, shuffle: bool) -> DataLoader[LabelledImages]:
        dataset = _Batches(images.pixels, images.labels)
        order = torch.utils.data.RandomSampler(dataset) if shuffle else torch.utils.data.SequentialSampler(dataset)
        sampler = torch.utils.data.BatchSampler(order, self.batch_size, drop_last=shuffle)
        return DataLoader(dataset, sampler=sampler, batch_size=None)
