from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from lit_shortcut.convert import to_published, to_safetensors
from lit_shortcut.networks.shortcut import ShortcutNet
from lit_shortcut.published import load_state
from lit_shortcut.weights import WeightsError, fingerprint, load_tensors, save_module

STATE = {"conv.weight": torch.arange(6.0).view(2, 3), "conv.bias": torch.ones(2)}
STATE["tied.weight"] = STATE["conv.weight"]


class Hostile:
    """Runs ``function(*arguments)`` in whoever unpickles it."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.reduced = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


@pytest.fixture
def of_old_lightning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint that names classes of a library which is not installed, as key and as object."""
    module = ModuleType("gone_library")
    for name in ("ModelCheckpoint", "Config"):
        setattr(module, name, type(name, (), {"__module__": "gone_library", "__qualname__": name}))
    monkeypatch.setitem(sys.modules, "gone_library", module)
    config = module.Config()
    config.path = Path("somewhere")
    path = tmp_path / "last.ckpt"
    torch.save({"callbacks": {module.ModelCheckpoint: {"best": 1.5}}, "config": config, "state_dict": STATE}, path)
    monkeypatch.delitem(sys.modules, "gone_library")
    return path


def test_refusal_names_the_command_that_keeps_the_tensors(of_old_lightning: Path) -> None:
    with pytest.raises(WeightsError) as caught:
        load_state(of_old_lightning)
    target = of_old_lightning.with_suffix(".safetensors")
    message = str(caught.value)
    assert "gone_library.ModelCheckpoint" in message
    assert f"python -m lit_shortcut.convert to_safetensors {of_old_lightning} {target}" in message
    assert "weights_only=False" not in message
    assert "set to `False`" not in message


def test_tensors_are_kept_without_the_library_that_wrote_the_rest(of_old_lightning: Path) -> None:
    target = of_old_lightning.with_suffix(".safetensors")
    to_safetensors(of_old_lightning, target)
    assert fingerprint(load_state(target)) == fingerprint(STATE)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("gone_library")


@pytest.mark.parametrize("function", [exec, eval], ids=["exec", "eval"])
def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: Any) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.ckpt"
    torch.save({"state_dict": STATE, "other": Hostile(function, "open('executed', 'w')")}, path)
    with pytest.raises(WeightsError, match=r"a\.ckpt"):
        load_state(path)
    to_safetensors(path, tmp_path / "a.safetensors")
    assert not Path("executed").exists()
    assert fingerprint(load_state(tmp_path / "a.safetensors")) == fingerprint(STATE)


@pytest.mark.parametrize(
    "hostile",
    [Hostile(os.system, "touch executed"), Hostile(Path.touch, Path("executed"))],
    ids=["the system", "a method"],
)
def test_call_without_a_stand_in_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hostile: Hostile) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.ckpt"
    torch.save({"state_dict": STATE, "other": hostile}, path)
    with pytest.raises(WeightsError, match=r"a\.ckpt: not readable without running its code"):
        to_safetensors(path, tmp_path / "a.safetensors")
    assert {file.name for file in tmp_path.iterdir()} == {"a.ckpt"}


@pytest.mark.parametrize("keep", [0, 50, 600])
def test_truncated_checkpoint_is_refused_by_name(of_old_lightning: Path, keep: int) -> None:
    of_old_lightning.write_bytes(of_old_lightning.read_bytes()[:keep])
    with pytest.raises(WeightsError, match=r"last\.ckpt: not readable"):
        to_safetensors(of_old_lightning, of_old_lightning.with_suffix(".safetensors"))


def test_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"none\.ckpt: no such checkpoint"):
        to_safetensors(tmp_path / "none.ckpt", tmp_path / "out.safetensors")


def test_tensors_are_kept_however_they_lie_in_memory(tmp_path: Path) -> None:
    weight = torch.arange(24.0).view(1, 2, 3, 4).to(memory_format=torch.channels_last)
    torch.save({"state_dict": {"weight": weight}}, tmp_path / "a.ckpt")
    to_safetensors(tmp_path / "a.ckpt", tmp_path / "a.safetensors")
    assert torch.equal(load_tensors(tmp_path / "a.safetensors")[0]["weight"], weight)


def test_checkpoint_without_a_state_dict_is_refused(tmp_path: Path) -> None:
    torch.save({"iter": 3}, tmp_path / "a.ckpt")
    with pytest.raises(WeightsError, match=r"a\.ckpt: expected a state dict"):
        to_safetensors(tmp_path / "a.ckpt", tmp_path / "a.safetensors")


@pytest.mark.parametrize("uses_time", [True, False])
def test_shortcut_goes_to_the_released_form_and_back(tmp_path: Path, uses_time: bool) -> None:
    network = ShortcutNet(32, num_heads=2, uses_time=uses_time)
    torch.nn.init.normal_(network.widen.weight)
    save_module(tmp_path / "ours.safetensors", network)
    to_published(tmp_path / "ours.safetensors", tmp_path / "maskgit-shortcut.pth")
    released = torch.load(tmp_path / "maskgit-shortcut.pth", weights_only=True)
    assert torch.equal(released["proj_out.weight"], network.widen.weight)
    returned = ShortcutNet.load_published(tmp_path / "maskgit-shortcut.pth", num_heads=2)
    assert fingerprint(returned.state_dict()) == fingerprint(network.state_dict())
    assert returned.hparams == network.hparams


@pytest.mark.parametrize(
    "option",
    [
        {"guided": True},
        {"rows": "masked"},
        {"anchored": True},
        {"uses_control": False},
        {"uses_self_attention": False},
        {"num_convs": 1, "grid": 2},
    ],
)
def test_shortcut_that_the_released_form_cannot_tell_apart_is_refused(tmp_path: Path, option: dict[str, Any]) -> None:
    save_module(tmp_path / "ours.safetensors", ShortcutNet(32, num_heads=2, **option))
    name = next(iter(option))
    with pytest.raises(WeightsError, match=rf"ours\.safetensors: the release's form has no place for {name} "):
        to_published(tmp_path / "ours.safetensors", tmp_path / "maskgit-shortcut.pth")
    assert not (tmp_path / "maskgit-shortcut.pth").exists()


def test_command_line_converts(of_old_lightning: Path) -> None:
    target = of_old_lightning.with_suffix(".safetensors")
    command = [sys.executable, "-m", "lit_shortcut.convert", "to_safetensors", of_old_lightning, target]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert load_state(target).keys() == STATE.keys()
