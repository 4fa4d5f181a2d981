from __future__ import annotations

from collections.abc import Callable

import lightning as L
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.plugins.precision import MixedPrecision, Precision

from lit_shortcut import precision
from lit_shortcut.precision import (
    bfloat16_mixed_where_native,
    bfloat16_where_native,
    require_precision,
    require_same_device,
)

CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda"), torch.device("mps")


@pytest.mark.parametrize(
    ("choice", "is_native", "name"),
    [
        (bfloat16_where_native, True, "bf16-true"),
        (bfloat16_where_native, False, "32-true"),
        (bfloat16_mixed_where_native, True, "bf16-mixed"),
        (bfloat16_mixed_where_native, False, "32-true"),
    ],
)
def test_bfloat16_is_chosen_where_it_is_native(
    choice: Callable[[], Precision], is_native: bool, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "has_native_bfloat16", lambda: is_native)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    trainer = L.Trainer(accelerator="cpu", plugins=[choice()], logger=False, barebones=True)
    assert trainer.precision == name


@pytest.mark.parametrize(
    ("avx512", "amx", "is_native"), [(False, False, False), (True, False, True), (False, True, True)]
)
def test_instructions_of_the_cpu_decide(
    avx512: bool, amx: bool, is_native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert precision.has_native_bfloat16() == is_native


def test_yaml_can_name_it() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--plugin", type=Precision)
    config = parser.parse_object({"plugin": {"class_path": "lit_shortcut.precision.bfloat16_where_native"}})
    assert isinstance(parser.instantiate_classes(config).plugin, Precision)


def test_autocast_of_another_device_is_refused() -> None:
    require_same_device(MixedPrecision("bf16-mixed", "cpu"), CPU)
    with pytest.raises(ValueError, match="bf16-mixed was chosen for cuda, but the trainer runs on cpu"):
        require_same_device(MixedPrecision("bf16-mixed", "cuda"), CPU)


@pytest.mark.parametrize("name", ["32-true", "bf16-true", "bf16-mixed", "64-true"])
def test_a_precision_that_the_cpu_has_passes(name: str) -> None:
    require_precision(name, CPU)


@pytest.mark.parametrize(("name", "device"), [("16-true", CPU), ("64-true", MPS), ("bf16-mixed", CUDA)])
def test_a_precision_that_the_device_lacks_is_refused(
    name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "has_native_bfloat16", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(ValueError, match=f"precision {name}: .* does not compute in"):
        require_precision(name, device)
