from __future__ import annotations

from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from datamodules.images import ImageFolder
from lit_shortcut.images import LabelledImages


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Two classes: a wide image, white in its middle third and black at both ends; and a tall grey one."""
    for name in ("n02", "n01"):
        (tmp_path / name).mkdir()
    wide = Image.new("RGB", (90, 30))
    wide.paste((255, 255, 255), (30, 0, 60, 30))
    wide.save(tmp_path / "n01" / "wide.png")
    Image.new("L", (10, 40), 77).save(tmp_path / "n02" / "tall.JPEG")
    return tmp_path


def test_images_are_cropped_at_their_centre_and_labelled_by_folder(classes: Path) -> None:
    (batch,) = ImageFolder(classes, image_size=30).predict_dataloader()
    assert batch.pixels.shape == (2, 3, 30, 30)
    assert batch.pixels.dtype == torch.uint8
    assert batch.labels.tolist() == [0, 1]
    assert bool((batch.pixels[0] == 255).all())
    assert batch.pixels[1].unique().tolist() == [77]


def test_shorter_side_is_resized_to_the_size_of_the_images(classes: Path) -> None:
    (batch,) = ImageFolder(classes, image_size=10).predict_dataloader()
    assert batch.pixels.shape == (2, 3, 10, 10)
    assert bool((batch.pixels[0, :, :, 2:-2] == 255).all())
    (one, other) = ImageFolder(classes, image_size=60, batch_size=1).predict_dataloader()
    assert one.pixels.shape == other.pixels.shape == (1, 3, 60, 60)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_unreadable_image_is_named(classes: Path, num_workers: int) -> None:
    path = classes / "n02" / "tall.JPEG"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"n02/tall\.JPEG: not a readable image"):
        list(ImageFolder(classes, image_size=30, num_workers=num_workers).predict_dataloader())
    path.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"n02/tall\.JPEG: not a readable image"):
        list(ImageFolder(classes, image_size=30, num_workers=num_workers).predict_dataloader())


def test_folder_without_classes_is_named(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match=folder.name):
            ImageFolder(folder).predict_dataloader()


def test_hidden_files_and_folders_are_left_out(classes: Path) -> None:
    for name in (".ipynb_checkpoints", "__MACOSX", "n01/.ipynb_checkpoints"):
        (classes / name).mkdir()
        Image.new("L", (8, 8)).save(classes / name / "copy.png")
    Image.new("L", (8, 8)).save(classes / "n02" / "._tall.png")
    (classes / "n02" / "Thumbs.db").write_bytes(b"no image")
    (batch,) = ImageFolder(classes, image_size=30).predict_dataloader()
    assert batch.labels.tolist() == [0, 1]
    assert bool((batch.pixels[0] == 255).all())
    assert batch.pixels[1].unique().tolist() == [77]


def pixels_of(folder: Path, image: Image.Image, name: str) -> Tensor:
    (folder / "class").mkdir()
    image.save(folder / "class" / name)
    (batch,) = ImageFolder(folder, image_size=4).predict_dataloader()
    return batch.pixels[0]


@pytest.mark.parametrize("name", ["grey.png", "grey.tif"])
def test_sixteen_bits_are_scaled_to_eight(tmp_path: Path, name: str) -> None:
    values = np.array([0, 257, 128 * 257, 65535], dtype=np.uint16)
    pixels = pixels_of(tmp_path, Image.fromarray(np.tile(values, (4, 1))), name)
    assert pixels.tolist() == [[[0, 1, 128, 255]] * 4] * 3


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_images_of_unknown_range_are_refused_by_name(tmp_path: Path, kind: type) -> None:
    image = Image.fromarray(np.full((4, 4), 70, dtype=kind))
    with pytest.raises(ValueError, match=rf"wide\.tif: .*mode {image.mode}"):
        pixels_of(tmp_path, image, "wide.tif")


def test_alpha_is_dropped_and_orientation_not_applied(tmp_path: Path) -> None:
    image = Image.new("RGBA", (4, 4), (200, 100, 50, 0))
    image.paste((10, 20, 30, 128), (0, 0, 4, 1))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    (tmp_path / "class").mkdir()
    image.save(tmp_path / "class" / "clear.png", exif=exif)
    (batch,) = ImageFolder(tmp_path, image_size=4).predict_dataloader()
    assert batch.pixels[0, :, 0].unique(dim=1).tolist() == [[10], [20], [30]]
    assert batch.pixels[0, :, 1:].flatten(1).unique(dim=1).tolist() == [[200], [100], [50]]


class Counting(L.LightningModule):
    """Keeps the batches that ``predict`` hands out."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[LabelledImages] = []

    def predict_step(self, batch: LabelledImages, batch_idx: int) -> int:
        self.batches.append(batch)
        return batch_idx


def test_predict_takes_every_image_once(classes: Path) -> None:
    task, quiet = Counting(), {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    trainer = L.Trainer(**quiet)  # type: ignore[arg-type]
    trainer.predict(task, datamodule=ImageFolder(classes, image_size=8, batch_size=1), return_predictions=False)
    assert [batch.labels.tolist() for batch in task.batches] == [[0], [1]]
    assert all(isinstance(batch, LabelledImages) for batch in task.batches)
