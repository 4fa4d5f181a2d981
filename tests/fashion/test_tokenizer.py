from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lit_shortcut.fashion.tokenizer import FSQTokenizer
from lit_shortcut.weights import save_module


@pytest.fixture
def tokenizer() -> FSQTokenizer:
    torch.manual_seed(0)
    tokenizer = FSQTokenizer(levels=[4, 3, 5], width=8, image_size=32)
    with torch.no_grad():  # spread the codes, as training would
        tokenizer.encoder[-1].weight.mul_(8)
    return tokenizer.eval()


def images(count: int, channels: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(256, (count, channels, 32, 32), generator=generator, dtype=torch.uint8)


def test_codes_are_a_grid_of_integers_of_the_codebook(tokenizer: FSQTokenizer) -> None:
    codes = tokenizer.encode(images(3))
    assert tokenizer.codebook_size == 60
    assert codes.shape == (3, 16 * 16)
    assert codes.dtype == torch.int64
    assert 0 <= codes.min()
    assert codes.max() < 60
    assert len(codes.unique()) > 5


def test_decode_gives_grey_images_of_every_code(tokenizer: FSQTokenizer) -> None:
    decoded = tokenizer.decode(torch.arange(2 * 256).view(2, 256) % tokenizer.codebook_size)
    assert decoded.dtype == torch.uint8
    assert decoded.shape == (2, 3, 32, 32)
    assert torch.equal(decoded[:, 0], decoded[:, 1])
    assert torch.equal(decoded[:, 0], decoded[:, 2])


def test_decode_of_encode_equals_the_training_pass(tokenizer: FSQTokenizer) -> None:
    pixels = images(2)
    reconstructions = tokenizer(pixels.float() / 127.5 - 1)
    expected = ((reconstructions + 1) * 127.5).round().clamp(0, 255)
    assert (tokenizer.decode(tokenizer.encode(pixels))[:, :1].float() - expected).abs().max() <= 1


def test_codes_stand_for_what_the_quantiser_gave_and_all_occur(tokenizer: FSQTokenizer) -> None:
    encoded = 2 * torch.randn(1, 3, 100, 100, generator=torch.Generator().manual_seed(2))
    quantized, codes = tokenizer.quantizer(encoded)
    torch.testing.assert_close(tokenizer.quantizer.indices_to_codes(codes), quantized)
    assert torch.equal(codes.unique(), torch.arange(tokenizer.codebook_size, dtype=codes.dtype))


@pytest.mark.parametrize(("rows", "columns"), [((0, 6), (22, 32)), ((22, 32), (0, 6))])
def test_codes_run_row_by_row(tokenizer: FSQTokenizer, rows: tuple[int, int], columns: tuple[int, int]) -> None:
    """A change of pixels in one corner reaches codes near that corner alone: 4 codes away, by four 3×3 convolutions."""
    before = images(1)
    after = before.clone()
    after[..., slice(*rows), slice(*columns)] = 255 - after[..., slice(*rows), slice(*columns)]
    changed = (tokenizer.encode(before) != tokenizer.encode(after)).view(16, 16).nonzero()
    assert len(changed) > 3
    assert rows[0] // 2 - 5 <= changed[:, 0].min() <= changed[:, 0].max() <= rows[1] // 2 + 4
    assert columns[0] // 2 - 5 <= changed[:, 1].min() <= changed[:, 1].max() <= columns[1] // 2 + 4


@pytest.mark.parametrize(("row", "column"), [(0, 15), (15, 0)])
def test_pixels_follow_their_code(tokenizer: FSQTokenizer, row: int, column: int) -> None:
    codes = torch.zeros(1, 256, dtype=torch.long)
    before = tokenizer.decode(codes)
    codes[0, row * 16 + column] = 59
    changed = (tokenizer.decode(codes) != before)[0, 0].nonzero()
    assert len(changed) > 0
    assert (changed - torch.tensor([2 * row, 2 * column])).abs().max() <= 14


def test_colours_are_averaged_to_grey(tokenizer: FSQTokenizer) -> None:
    grey = images(2)
    assert torch.equal(tokenizer.encode(grey.expand(-1, 3, -1, -1)), tokenizer.encode(grey))
    swapped = images(2, channels=3)
    assert torch.equal(tokenizer.encode(swapped), tokenizer.encode(swapped.roll(1, dims=1)))


def test_gradients_pass_the_quantiser(tokenizer: FSQTokenizer) -> None:
    tokenizer(images(1).float() / 127.5 - 1).square().mean().backward()
    for name, parameter in tokenizer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_load_returns_what_was_saved(tmp_path: Path, tokenizer: FSQTokenizer) -> None:
    save_module(tmp_path / "tokenizer.safetensors", tokenizer)
    loaded = FSQTokenizer.load(tmp_path / "tokenizer.safetensors")
    codes = tokenizer.encode(images(2))
    assert torch.equal(loaded.encode(images(2)), codes)
    assert torch.equal(loaded.decode(codes), tokenizer.decode(codes))


def test_odd_images_are_refused() -> None:
    with pytest.raises(ValueError, match=r"image_size must be even.*got 27"):
        FSQTokenizer([4, 4], 8, image_size=27)


def test_levels_below_three_are_refused() -> None:
    with pytest.raises(ValueError, match=r"levels must be at least 3.*\[4, 2\]"):
        FSQTokenizer([4, 2], 8, image_size=28)
