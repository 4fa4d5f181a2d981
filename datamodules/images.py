"""Folders of real images, for reference statistics."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2

from lit_shortcut.bounds import require_at_least
from lit_shortcut.images import LabelledImages
from lit_shortcut.inputs import located


class ImageFolder(L.LightningDataModule):
    """Images in one folder per class, such as ImageNet's ``val/n01440764/…``, for reference statistics.

    Images are converted to RGB, resized so that the shorter side is ``image_size`` (bilinear, antialiased), and cropped
    to the centre. 16-bit grey images are scaled to 8 bits; 32-bit and floating-point images, whose range is unknown,
    are refused. Alpha is dropped. EXIF orientation is not applied, as in torchvision's image folders. Classes are
    numbered in the order of their folders' names, which is ImageNet's order. Hidden files and folders (names that begin
    with a dot, ``__MACOSX``) are skipped.

    Args:
        folder: folder of the classes' folders.
        image_size: side of the square images in pixels.
        batch_size: images per batch.
        num_workers: number of reading processes.
    """

    def __init__(self, folder: Path, image_size: int = 512, batch_size: int = 50, num_workers: int = 0) -> None:
        super().__init__()
        require_at_least(1, image_size=image_size, batch_size=batch_size)
        require_at_least(0, num_workers=num_workers)
        self.folder, self.image_size = located(folder), image_size
        self.batch_size, self.num_workers = batch_size, num_workers

    def predict_dataloader(self) -> DataLoader[LabelledImages]:
        """Batches of all images in order; reading one raises ValueError with the file's name if it is damaged.

        Raises:
            FileNotFoundError: if the folder is missing, or it or a class holds no images.
        """
        to_square = v2.Compose([v2.Resize(self.image_size), v2.CenterCrop(self.image_size), v2.PILToTensor()])
        images = _Classes(str(self.folder), to_square, loader=_read_rgb, is_valid_file=self._is_image)
        return DataLoader(images, batch_size=self.batch_size, num_workers=self.num_workers, collate_fn=_labelled)

    def _is_image(self, path: str) -> bool:
        inside = Path(path).relative_to(self.folder)
        return inside.suffix.lower() in IMG_EXTENSIONS and not any(map(_is_hidden, inside.parts))


class _Classes(torchvision.datasets.ImageFolder):  # type: ignore[misc]  # untyped
    """torchvision's image folder without hidden folders among the classes."""

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        names = [name for name in super().find_classes(directory)[0] if not _is_hidden(name)]
        if not names:
            raise FileNotFoundError(f"{directory}: expected a folder for each class, found none")
        return names, {name: label for label, name in enumerate(names)}


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _read_rgb(path: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I;16"):
                return Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8)).convert("RGB")
            if image.mode in ("I", "F"):  # 32-bit integers, floating-point numbers
                kind = "32-bit integers" if image.mode == "I" else "floating-point numbers"
                raise ValueError(
                    f"its pixels are {kind} (mode {image.mode}) of unknown range; convert it to 8 or 16 bits"
                )
            return image.convert("RGB")
    # some of Pillow's formats raise SyntaxError, and modes without RGB ValueError
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a readable image ({error})") from error


def _labelled(items: list[tuple[Tensor, int]]) -> LabelledImages:
    pixels, labels = zip(*items, strict=True)
    return LabelledImages(torch.stack(pixels), torch.tensor(labels))
