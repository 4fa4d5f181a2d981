from __future__ import annotations

import gzip
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lit_shortcut.fashion.captions import SPECIAL_TOKENS, CaptionedFashionMNIST, captions, train_tokenizer, write_texts
from lit_shortcut.fashion.garments import follows, measure, read_prompt
from lit_shortcut.fashion.images import FashionMNIST
from tests.idx import idx


def write_idx(path: Path, values: Tensor) -> None:
    path.write_bytes(gzip.compress(idx(values)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty training and twenty test images: boxes of all sizes and shades."""
    generator = torch.Generator().manual_seed(0)
    for name, count in (("train", 40), ("t10k", 20)):
        pixels = torch.zeros(count, 28, 28, dtype=torch.uint8)
        for picture in pixels:
            height, width, shade = (
                int(torch.randint(low, high, (), generator=generator)) for low, high in ((4, 28), (4, 28), (30, 256))
            )
            picture[:height, :width] = shade
        write_idx(tmp_path / f"{name}-images-idx3-ubyte.gz", pixels)
        write_idx(tmp_path / f"{name}-labels-idx1-ubyte.gz", (torch.arange(count) % 10).byte())
    return tmp_path


def test_captions_are_true_of_their_images(folder: Path) -> None:
    for batch in CaptionedFashionMNIST(folder, batch_size=8, validation_images=8).train_dataloader():
        values = {name: column.tolist() for name, column in measure(batch.pixels).items()}
        for row, (label, prompt) in enumerate(zip(batch.labels.tolist(), batch.prompts, strict=True)):
            said = read_prompt(prompt)
            assert said.label == label
            assert all(follows({name: column[row] for name, column in values.items()}, label, said.attributes))


def test_training_captions_change_and_the_others_do_not(folder: Path) -> None:
    data = CaptionedFashionMNIST(folder, batch_size=8, validation_images=8)

    def texts(name: str) -> list[str]:
        return sorted(prompt for batch in getattr(data, name)() for prompt in batch.prompts)

    assert texts("train_dataloader") != texts("train_dataloader")
    assert texts("val_dataloader") == texts("val_dataloader")
    assert texts("test_dataloader") == texts("test_dataloader")


def test_seeded_training_has_the_same_captions_again(folder: Path) -> None:
    data = CaptionedFashionMNIST(folder, batch_size=8, validation_images=8)
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        runs.append([batch.prompts for batch in data.train_dataloader()])
    assert runs[0] == runs[1]


def test_tokenizer_gives_texts_back_and_knows_special_tokens_by_their_ids() -> None:
    tokenizer = train_tokenizer(["a dark coat", "a bright bag"] * 3, vocab_size=300)
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == list(range(len(SPECIAL_TOKENS)))
    for text in ("a dark bag", "größer, 3!"):  # the second has bytes that training never saw
        assert tokenizer.decode(tokenizer.encode(text).ids).strip() == text
    assert tokenizer.encode("A Dark COAT").ids == tokenizer.encode("a dark coat").ids


def test_texts_are_written_for_the_default(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_shortcut.fashion.images.DEBIAN_FOLDER", folder)
    target = tmp_path / "texts"
    target.mkdir()
    write_texts(target, vocab_size=300, num_training=5, num_held_out=3)
    test_images = FashionMNIST(folder).split("t10k")
    assert (target / "held_out_prompts.txt").read_text().splitlines() == list(captions(test_images, 3))
    assert len((target / "training_prompts.txt").read_text().splitlines()) == 5
    assert (target / "tokenizer.json").is_file()
