from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lit_shortcut.bases.maskgit.vqgan import VQGAN
from lit_shortcut.weights import WeightsError, save_tensors
from tests.parity.taming import Sizes, random_weights, write_folder

SIZES = Sizes(24, 4, 4, 32, [1, 2], 1, 16, [8])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_folder(tmp_path / "VQGAN", random_weights(SIZES, seed=0), SIZES)
    return tmp_path / "VQGAN"


def images(count: int, channels: int = 3) -> torch.Tensor:
    return torch.randint(256, (count, channels, 16, 16), generator=torch.Generator().manual_seed(1)).byte()


def test_images_become_codes_and_codes_images(folder: Path) -> None:
    vqgan = VQGAN.load_published(folder)
    codes = vqgan.encode(images(3))
    assert (codes.shape, codes.dtype) == ((3, 64), torch.int64)
    decoded = vqgan.decode(codes)
    assert (decoded.shape, decoded.dtype) == ((3, 3, 16, 16), torch.uint8)
    assert torch.equal(decoded, ((vqgan.pixels(codes) + 1) * 127.5).round().clamp(0, 255).byte())
    assert decoded.float().std() > 10


def test_codes_do_not_depend_on_the_chunk(folder: Path) -> None:
    vqgan = VQGAN.load_published(folder)
    codes = vqgan.encode(images(5))
    decoded = vqgan.decode(codes)
    vqgan.chunk = 2
    assert torch.equal(vqgan.encode(images(5)), codes)
    assert (vqgan.decode(codes).int() - decoded.int()).abs().max() <= 1  # a batch of another size may round otherwise


def test_grey_images_are_taken_as_three_equal_channels(folder: Path) -> None:
    vqgan, grey = VQGAN.load_published(folder), images(2, channels=1)
    assert torch.equal(vqgan.encode(grey), vqgan.encode(grey.expand(-1, 3, -1, -1)))


def test_loaded_network_is_frozen_and_whole(folder: Path) -> None:
    vqgan = VQGAN.load_published(folder)
    assert not vqgan.training
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in vqgan.parameters())


def test_converted_file_goes_before_the_checkpoint(folder: Path) -> None:
    expected = VQGAN.load_published(folder).encode(images(1))
    state = torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]
    save_tensors(folder / "last.safetensors", state, {})
    (folder / "last.ckpt").write_bytes(b"never read")
    assert torch.equal(VQGAN.load_published(folder).encode(images(1)), expected)


def change(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda params: params.update(changes)


def change_network(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda params: params["ddconfig"].update(changes)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (change(n_embed=16), r"quantize.embedding.weight has shape \(24, 4\), expected \(16, 4\)"),
        (change(embed_dim=8), r"quant_conv.weight has shape \(4, 4, 1, 1\), expected \(8, 4, 1, 1\)"),
        (change_network(attn_resolutions=[]), "encoder.down.1.attn.0.q.weight is unknown"),
        (change_network(attn_resolutions=[16]), "decoder.up.0.attn.1.proj_out.bias is missing"),
        (change_network(attn_resolutions=[5]), "encoder.down.1.attn.0.norm.bias is unknown"),
        (change_network(num_res_blocks=2), "encoder.down.0.block.1.conv1.weight is missing"),
        (change_network(double_z=True), r"model\.yaml: expected double_z false"),
        (change_network(in_channels=1), r"model\.yaml: .*'in_channels': 1"),
        (lambda params: params.pop("n_embed"), r"model\.yaml: .*n_embed"),
        (lambda params: params.pop("ddconfig"), r"model\.yaml: .*ddconfig"),
    ],
)
def test_configuration_that_does_not_fit_is_refused_by_name(
    folder: Path, edit: Callable[[dict[str, Any]], Any], message: str
) -> None:
    config = yaml.safe_load((folder / "model.yaml").read_text())
    edit(config["model"]["params"])
    (folder / "model.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(WeightsError, match=message) as caught:
        VQGAN.load_published(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("content", ["", "[1, 2]", "a: [", "model: 3", "\0"], ids=repr)
def test_damaged_configuration_is_refused_by_name(folder: Path, content: str) -> None:
    (folder / "model.yaml").write_text(content)
    with pytest.raises(WeightsError, match=r"model\.yaml: expected model\.params"):
        VQGAN.load_published(folder)


@pytest.mark.parametrize("name", ["model.yaml", "last.ckpt"])
def test_missing_file_is_refused_by_name(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(WeightsError, match=f"{name}: no such"):
        VQGAN.load_published(folder)


def test_truncated_checkpoint_is_refused_by_name(folder: Path) -> None:
    (folder / "last.ckpt").write_bytes((folder / "last.ckpt").read_bytes()[:1000])
    with pytest.raises(WeightsError, match=r"last\.ckpt: not a checkpoint"):
        VQGAN.load_published(folder)
