"""Folders of real images, for reference statistics."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import torch
import torchvision
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from lit_shortcut.contracts import LabelledImages


class ImageFolder(L.LightningDataModule):
    """Images in one folder a class, such as ImageNet's ``val/n01440764/…``, for reference statistics.

    Each is made RGB, its shorter side resized to ``image_size`` (bilinear, antialiased), and its centre cropped.
    Classes are numbered in the order of their folders' names, ImageNet's own order.

    Args:
        folder: holds the classes' folders.
        image_size: side of the square images in pixels.
        batch_size: images per batch.
        num_workers: reading processes.
    """

    def __init__(self, folder: Path, image_size: int = 512, batch_size: int = 50, num_workers: int = 0) -> None:
        super().__init__()
        self.folder, self.image_size = folder, image_size
        self.batch_size, self.num_workers = batch_size, num_workers

    def predict_dataloader(self) -> DataLoader[LabelledImages]:
        """All images in order; one that cannot be read raises ValueError, which names it.

        Raises:
            FileNotFoundError: if the folder is missing, or it or a class in it holds no images.
        """
        to_square = v2.Compose([v2.Resize(self.image_size), v2.CenterCrop(self.image_size), v2.PILToTensor()])
        images = torchvision.datasets.ImageFolder(str(self.folder), to_square, loader=_read_rgb)
        return DataLoader(images, batch_size=self.batch_size, num_workers=self.num_workers, collate_fn=_labelled)


def _read_rgb(path: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # some of Pillow's formats raise SyntaxError
        raise ValueError(f"{path}: not a readable image ({error})") from error


def _labelled(items: list[tuple[Tensor, int]]) -> LabelledImages:
    pixels, labels = zip(*items, strict=True)
    return LabelledImages(torch.stack(pixels), torch.tensor(labels))
