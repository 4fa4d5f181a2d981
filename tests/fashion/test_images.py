from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lit_shortcut.fashion.classifier import ClassifierTask, FashionCNN
from lit_shortcut.fashion.images import FashionMNIST, read_idx
from lit_shortcut.images import LabelledImages
from tests.idx import idx
from tests.tasks.short_runs import short_trainer

TRAIN, TEST, SIDE = 20, 6, 4
STEMS = ("images-idx3-ubyte", "labels-idx1-ubyte")


def split(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (count, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    pixels[:, 0, 0] = torch.arange(count)  # the first pixel tells which image it is
    return pixels, (torch.arange(count) % 10).byte()


@pytest.fixture(params=["plain", "gzipped"])
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    for name, count, seed in (("train", TRAIN, 1), ("t10k", TEST, 2)):
        for stem, values in zip(STEMS, split(count, seed), strict=True):
            if request.param == "plain":
                (tmp_path / f"{name}-{stem}").write_bytes(idx(values))
            else:
                (tmp_path / f"{name}-{stem}.gz").write_bytes(gzip.compress(idx(values)))
    return tmp_path


def test_split_returns_what_the_files_hold(folder: Path) -> None:
    for name, count, seed in (("train", TRAIN, 1), ("t10k", TEST, 2)):
        images, (pixels, labels) = FashionMNIST(folder).split(name), split(count, seed)
        assert images.pixels.dtype == torch.uint8
        assert torch.equal(images.pixels, pixels[:, None])
        assert torch.equal(images.labels, labels.long())


def test_validation_images_are_the_last_ones_and_never_trained_on(folder: Path) -> None:
    data = FashionMNIST(folder, batch_size=5, validation_images=5)
    (validated,) = data.val_dataloader()
    assert validated.pixels[:, 0, 0, 0].tolist() == [15, 16, 17, 18, 19]
    assert validated.labels.tolist() == [5, 6, 7, 8, 9]
    trained = torch.cat([batch.pixels[:, 0, 0, 0] for batch in data.train_dataloader()])
    assert trained.sort().values.tolist() == list(range(15))


def test_training_images_are_shuffled_anew_with_their_labels(folder: Path) -> None:
    loader = FashionMNIST(folder, batch_size=5, validation_images=5).train_dataloader()
    torch.manual_seed(0)
    orders = []
    for _ in range(2):
        batches = list(loader)
        assert all(torch.equal(batch.labels, batch.pixels[:, 0, 0, 0].long() % 10) for batch in batches)
        orders.append([int(which) for batch in batches for which in batch.pixels[:, 0, 0, 0]])
    assert orders[0] != orders[1] != list(range(15))


def test_incomplete_batches_are_kept_unless_trained_on(folder: Path) -> None:
    data = FashionMNIST(folder, batch_size=4, validation_images=5)
    assert [len(batch.labels) for batch in data.train_dataloader()] == [4, 4, 4]
    assert [len(batch.labels) for batch in data.val_dataloader()] == [4, 1]
    assert [len(batch.labels) for batch in data.test_dataloader()] == [4, 2]


def test_test_images_come_in_order(folder: Path) -> None:
    loader = FashionMNIST(folder, batch_size=4).test_dataloader()
    assert torch.cat([batch.pixels[:, 0, 0, 0] for batch in loader]).tolist() == list(range(TEST))


def test_missing_file_of_a_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="train-images-idx3-ubyte: not a readable IDX file"):
        FashionMNIST(tmp_path).split("train")


CONTENT = idx(torch.arange(24, dtype=torch.uint8).view(2, 3, 4))
PACKED = gzip.compress(CONTENT)


def test_idx_returns_the_values_in_order(tmp_path: Path) -> None:
    for name, content in (("a", CONTENT), ("a.gz", PACKED)):
        (tmp_path / name).write_bytes(content)
        assert torch.equal(read_idx(tmp_path / name), torch.arange(24, dtype=torch.uint8).view(2, 3, 4))


DAMAGES: dict[str, tuple[str, Callable[[], bytes | None]]] = {
    "missing": ("a", lambda: None),
    "empty": ("a", lambda: b""),
    "cut in the magic": ("a", lambda: CONTENT[:3]),
    "cut in the sizes": ("a", lambda: CONTENT[:9]),
    "cut after the header": ("a", lambda: CONTENT[:16]),
    "cut in the values": ("a", lambda: CONTENT[:-1]),
    "too long": ("a", lambda: CONTENT + b"x"),
    "wrong magic": ("a", lambda: b"\x01" + CONTENT[1:]),
    "of floats": ("a", lambda: CONTENT[:2] + b"\x0d" + CONTENT[3:]),
    "a picture": ("a", lambda: b"\x89PNG\r\n\x1a\n" + bytes(64)),
    "empty gzip": ("a.gz", lambda: b""),
    "cut gzip": ("a.gz", lambda: PACKED[:-9]),
    "not gzipped": ("a.gz", lambda: CONTENT),
    "gzip with a wrong checksum": ("a.gz", lambda: PACKED[:-8] + bytes(4) + PACKED[-4:]),
    "gzip damaged inside": ("a.gz", lambda: PACKED[:10] + b"\xff" * 8 + PACKED[18:]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_file_is_refused_by_name(tmp_path: Path, damage: str) -> None:
    name, make = DAMAGES[damage]
    content = make()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="IDX file") as caught:
        read_idx(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize("validation_images", [20, 1000])
def test_validation_images_that_leave_nothing_are_refused(folder: Path, validation_images: int) -> None:
    with pytest.raises(ValueError, match="validation_images must lie in 1"):
        FashionMNIST(folder, validation_images=validation_images).train_dataloader()


def test_labels_that_do_not_match_the_images_are_refused(folder: Path) -> None:
    (path,) = folder.glob("train-labels*")
    content = idx(torch.zeros(3, dtype=torch.uint8))
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    with pytest.raises(ValueError, match="images but 3 labels in split 'train'"):
        FashionMNIST(folder).split("train")


@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
def test_batches_to_overfit_are_the_same_in_every_epoch(folder: Path, tmp_path: Path) -> None:
    seen: list[list[int]] = []

    class Task(ClassifierTask):
        def training_step(self, batch: LabelledImages, batch_idx: int) -> Tensor:
            seen.append(batch.pixels.flatten(1).sum(1).tolist())
            return super().training_step(batch, batch_idx)

    trainer = short_trainer(tmp_path, overfit_batches=2, enable_checkpointing=False)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(Task(FashionCNN(width=2)), datamodule=FashionMNIST(folder, batch_size=3, validation_images=5))
    assert len(seen) == 6
    assert seen[:2] == seen[2:4] == seen[4:]
    assert {len(batch) for batch in seen} == {3}
