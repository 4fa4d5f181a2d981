"""Fashion-MNIST, the data of the embedded default."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torchvision
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler

from lit_shortcut.bounds import require_at_least
from lit_shortcut.images import LabelledImages
from lit_shortcut.inputs import located

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package dataset-fashion-mnist
_IDX_UINT8 = 0x08


def read_idx(path: Path) -> Tensor:
    """Read the uint8 tensor in the IDX file ``path``, gzipped or not (LeCun's MNIST format).

    Raises:
        ValueError: naming the file, if it is missing, truncated or of another kind.
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
    """Batches by lists of indices, so that collation is one indexing operation."""

    def __init__(self, pixels: Tensor, labels: Tensor) -> None:
        self.pixels, self.labels = pixels, labels

    def __getitems__(self, indices: list[int]) -> LabelledImages:
        chosen = torch.as_tensor(indices)
        return LabelledImages(self.pixels[chosen], self.labels[chosen])

    def __len__(self) -> int:
        return len(self.labels)


class FashionMNIST(L.LightningDataModule):
    """Fashion-MNIST (Xiao et al., arXiv 1708.07747): 60,000 training and 10,000 test images, 28×28, 10 classes.

    Args:
        folder: folder of the four IDX files. None takes Debian's package ``dataset-fashion-mnist`` if it is installed,
            else torchvision's download into ``data/``.
        batch_size: images per batch and rank.
        validation_images: number of the last training images, held out for validation.
    """

    def __init__(self, folder: Path | None = None, batch_size: int = 64, validation_images: int = 2000) -> None:
        super().__init__()
        require_at_least(1, batch_size=batch_size, validation_images=validation_images)
        folder = None if folder is None else located(folder)
        self.folder, self.batch_size, self.validation_images = folder, batch_size, validation_images

    def prepare_data(self) -> None:
        """Download once, on one rank, if no folder is given and Debian's package is not installed."""
        if self.folder is None and not DEBIAN_FOLDER.is_dir():
            torchvision.datasets.FashionMNIST("data", download=True)

    def split(self, name: str) -> LabelledImages:
        """Return all images of split ``name``, ``train`` or ``t10k`` (test).

        Raises:
            ValueError: if a file is missing or damaged, or the numbers of labels and images differ.
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
        """Return batches of training images, reshuffled each epoch."""
        return self._loader(self._parts()[0], shuffle=True)

    def val_dataloader(self) -> DataLoader[LabelledImages]:
        """Return batches of the held-out training images."""
        return self._loader(self._parts()[1], shuffle=False)

    def test_dataloader(self) -> DataLoader[LabelledImages]:
        """Return batches of the 10,000 test images."""
        return self._loader(self.split("t10k"), shuffle=False)

    def predict_dataloader(self) -> DataLoader[LabelledImages]:
        """Return batches of the 10,000 test images, for reference statistics."""
        return self.test_dataloader()

    def _parts(self) -> tuple[LabelledImages, LabelledImages]:
        """Return the training images and the held-out ones."""
        images = self.split("train")
        count = len(images.labels) - self.validation_images
        if not 0 < count < len(images.labels):
            raise ValueError(
                f"validation_images must lie in 1..{len(images.labels) - 1}, below the number of training images; "
                f"got {self.validation_images}"
            )
        return (
            LabelledImages(images.pixels[:count], images.labels[:count]),
            LabelledImages(images.pixels[count:], images.labels[count:]),
        )

    def _batches(self, images: LabelledImages, *, shuffle: bool) -> Dataset[Any]:
        return _Batches(images.pixels, images.labels)

    def _loader(self, images: LabelledImages, *, shuffle: bool) -> DataLoader[LabelledImages]:
        batches: Any = self._batches(images, shuffle=shuffle)
        overfits = bool(self.trainer and self.trainer.overfit_batches)  # type: ignore[attr-defined]
        order = RandomSampler(batches) if shuffle and not overfits else SequentialSampler(batches)
        # by a batch sampler, which Lightning knows how to share out among ranks and leaves as it is to overfit
        sampler = BatchSampler(order, self.batch_size, drop_last=shuffle)
        return DataLoader(batches, batch_sampler=sampler, collate_fn=_as_it_is)


def _as_it_is(batch: Any) -> Any:
    return batch
