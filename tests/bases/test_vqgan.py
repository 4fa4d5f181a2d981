from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lit_shortcut.bases.maskgit.vqgan import load_vqgan
from lit_shortcut.weights import WeightsError, save_tensors
from tests.parity.taming import Sizes, random_weights, write_folder

SIZES = Sizes(24, 4, 4, 32, [1, 2], 1, 16, [8])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_folder(tmp_path / "VQGAN", random_weights(SIZES, seed=0), SIZES)
    return tmp_path / "VQGAN"


def some_codes() -> torch.Tensor:
    return torch.randint(SIZES.n_embed, (2, 64), generator=torch.Generator().manual_seed(1))


def test_codes_become_images(folder: Path) -> None:
    images = load_vqgan(folder).decode(some_codes())
    assert (images.shape, images.dtype) == ((2, 3, 16, 16), torch.uint8)
    assert images.float().std() > 10


def test_loaded_network_is_frozen_and_has_no_encoder(folder: Path) -> None:
    vqgan = load_vqgan(folder)
    assert not vqgan.training
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in vqgan.parameters())
    assert {name.split(".")[0] for name in vqgan.state_dict()} == {"codes", "post_quant_conv", "decoder"}


def test_converted_file_goes_before_the_checkpoint(folder: Path) -> None:
    expected = load_vqgan(folder).decode(some_codes())
    state = torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]
    save_tensors(folder / "last.safetensors", state, {})
    (folder / "last.ckpt").write_bytes(b"never read")
    assert torch.equal(load_vqgan(folder).decode(some_codes()), expected)


def change(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda params: params.update(changes)


def change_network(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda params: params["ddconfig"].update(changes)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (change(n_embed=16), r"quantize.embedding.weight has shape \(24, 4\), expected \(16, 4\)"),
        (change(embed_dim=8), r"post_quant_conv.weight has shape \(4, 4, 1, 1\), expected \(4, 8, 1, 1\)"),
        (change_network(attn_resolutions=[]), "decoder.up.1.attn.0.q.weight is unknown"),
        (change_network(attn_resolutions=[16]), "decoder.up.0.attn.1.proj_out.bias is missing"),
        (change_network(attn_resolutions=[5]), "decoder.up.1.attn.0.norm.bias is unknown"),
        (change_network(num_res_blocks=2), "decoder.up.0.block.2.conv1.weight is missing"),
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
        load_vqgan(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("content", ["", "[1, 2]", "a: [", "model: 3", "\0"], ids=repr)
def test_damaged_configuration_is_refused_by_name(folder: Path, content: str) -> None:
    (folder / "model.yaml").write_text(content)
    with pytest.raises(WeightsError, match=r"model\.yaml: expected model\.params"):
        load_vqgan(folder)


@pytest.mark.parametrize("name", ["model.yaml", "last.ckpt"])
def test_missing_file_is_refused_by_name(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(WeightsError, match=f"{name}: no such"):
        load_vqgan(folder)


def test_truncated_checkpoint_is_refused_by_name(folder: Path) -> None:
    (folder / "last.ckpt").write_bytes((folder / "last.ckpt").read_bytes()[:1000])
    with pytest.raises(WeightsError, match=r"last\.ckpt: not a checkpoint"):
        load_vqgan(folder)
