from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn

from lit_shortcut.weights import (
    WeightsError,
    fingerprint,
    load_module,
    load_tensors,
    save_module,
    save_tensors,
    update_manifest,
)


class Small(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.hparams = {"width": width}
        self.linear = nn.Linear(width, 2)
        self.register_buffer("seen", torch.tensor(3))


class Other(Small):
    pass


@pytest.fixture
def module() -> Small:
    torch.manual_seed(0)
    return Small(4)


@pytest.fixture
def saved(tmp_path: Path, module: Small) -> Path:
    path = tmp_path / "made" / "small.safetensors"
    save_module(path, module, {"step": 7})
    return path


def test_load_returns_what_was_saved(saved: Path, module: Small) -> None:
    loaded = load_module(Small, saved)
    assert loaded.hparams == module.hparams
    for name, tensor in module.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert load_tensors(saved)[1] == {"class": "Small", "hparams": {"width": 4}, "step": 7}


def test_save_leaves_one_file(saved: Path) -> None:
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool], ids=str
)
def test_tensors_of_every_type_return(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"a": torch.arange(6).view(2, 3).to(dtype), "scalar": torch.tensor(1).to(dtype)}
    metadata = {"list": [1, 2.5, None], "text": "größer", "nested": {"yes": True}}
    save_tensors(tmp_path / "any.safetensors", tensors, metadata)
    returned, facts = load_tensors(tmp_path / "any.safetensors")
    assert facts == metadata
    assert returned.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert returned[name].dtype == dtype
        assert torch.equal(returned[name], tensor)


def test_failed_save_leaves_the_old_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()

    def half_way(path: Path, content: bytes) -> None:
        path.write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", half_way)
    with pytest.raises(OSError, match="disk full"):
        save_tensors(saved, {"a": torch.ones(1)}, {})
    assert saved.read_bytes() == before


def missing(path: Path) -> None:
    path.unlink()


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def cut_in_the_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:20])


def cut_in_the_tensors(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def another_format(path: Path) -> None:
    path.write_bytes(b"PK\x03\x04" + bytes(200))


def of_another_class(path: Path) -> None:
    save_module(path, Other(4))


def of_nobody(path: Path) -> None:
    save_file({"a": torch.ones(1)}, path)


def of_another_project(path: Path) -> None:
    save_file({"a": torch.ones(1)}, path, metadata={"format": "pt"})


def of_another_shape(path: Path) -> None:
    tensors = Small(5).state_dict()
    save_tensors(path, tensors, {"class": "Small", "hparams": {"width": 4}})


def of_other_names(path: Path) -> None:
    tensors = {f"renamed.{name}": tensor for name, tensor in Small(4).state_dict().items()}
    save_tensors(path, tensors, {"class": "Small", "hparams": {"width": 4}})


def without_arguments(path: Path) -> None:
    save_tensors(path, Small(4).state_dict(), {"class": "Small"})


def with_unknown_arguments(path: Path) -> None:
    save_tensors(path, Small(4).state_dict(), {"class": "Small", "hparams": {"depth": 4}})


DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (missing, "no such weight file"),
    (folder, "not a readable safetensors file"),
    (empty, "not a readable safetensors file"),
    (cut_in_the_header, "not a readable safetensors file"),
    (cut_in_the_tensors, "not a readable safetensors file"),
    (another_format, "not a readable safetensors file"),
    (of_another_class, "expected the weights of a Small, found 'Other'"),
    (of_nobody, "expected the weights of a Small, found None"),
    (of_another_project, ""),
    (of_another_shape, "size mismatch for linear.weight"),
    (of_other_names, "renamed.linear.weight"),
    (without_arguments, "hparams"),
    (with_unknown_arguments, "depth"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=[damage.__name__ for damage, _ in DAMAGES])
def test_file_that_does_not_fit_is_refused_by_name(saved: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(saved)
    with pytest.raises(WeightsError) as caught:
        load_module(Small, saved)
    assert str(saved) in str(caught.value)
    assert message in str(caught.value)


def checkpoint(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def test_network_of_a_checkpoint_loads_like_its_file(tmp_path: Path, module: Small) -> None:
    state = {f"network.{name}": tensor for name, tensor in module.state_dict().items()}
    facts = {"class": "Small", "hparams": {"width": 4}}
    path = checkpoint(tmp_path / "a.ckpt", {"state_dict": state | {"other.x": torch.ones(1)}, "network": facts})
    loaded = load_module(Small, path)
    assert fingerprint(loaded.state_dict()) == fingerprint(module.state_dict())


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("executed"),))


@pytest.mark.parametrize(
    ("content", "message"),
    [({"state_dict": {}}, "no key 'network'"), ([1], "no key 'network'"), (Hostile(), "weights_only=True")],
    ids=["of another project", "a list", "hostile"],
)
def test_foreign_checkpoint_is_refused_without_running_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: Any, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WeightsError, match=message) as caught:
        load_module(Small, checkpoint(tmp_path / "a.ckpt", content))
    assert "a.ckpt" in str(caught.value)
    assert not Path("executed").exists()


@pytest.mark.parametrize("keep", [0, 10, 300])
def test_truncated_or_missing_checkpoint_is_refused_by_name(tmp_path: Path, keep: int) -> None:
    path = checkpoint(tmp_path / "a.ckpt", {"network": {}, "state_dict": {}})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(WeightsError, match=r"a\.ckpt"):
        load_module(Small, path)
    with pytest.raises(WeightsError, match=r"absent\.ckpt: no such"):
        load_module(Small, tmp_path / "absent.ckpt")


def test_fingerprint_does_not_depend_on_order_or_memory_layout() -> None:
    a, b = torch.randn(3, 4), torch.randn(2)
    assert fingerprint({"a": a, "b": b}) == fingerprint({"b": b, "a": a})
    assert fingerprint({"a": a}) == fingerprint({"a": a.T.contiguous().T})
    assert fingerprint({"a": a}) == fingerprint({"a": nn.Parameter(a.clone())})
    assert fingerprint({"a": a[1:]}) == fingerprint({"a": a[1:].clone()})


def test_fingerprint_tells_names_types_shapes_and_single_bits_apart() -> None:
    a = torch.zeros(2, 6)
    one_bit = a.clone()
    one_bit[1, 5] = 1e-45
    different: list[dict[str, Tensor]] = [
        {"a": a},
        {"b": a},
        {"a": a.view(3, 4)},
        {"a": a.to(torch.int32)},
        {"a": one_bit},
        {"a": -a},
        {"a": a, "b": a},
        {"a": a[0], "b": a[1]},
        {"a": torch.zeros(())},
        {"a": torch.zeros(0, 3)},
        {"a": a.to(torch.bfloat16)},
        {"a": a.bool()},
        {},
    ]
    prints = [fingerprint(tensors) for tensors in different]
    assert len(set(prints)) == len(different)
    assert all(len(text) == 16 and int(text, 16) >= 0 for text in prints)


def test_fingerprint_survives_a_file(saved: Path, module: Small) -> None:
    assert fingerprint(load_tensors(saved)[0]) == fingerprint(module.state_dict())


def test_manifest_tells_size_and_sha256_of_each_file(saved: Path) -> None:
    update_manifest(saved, {"licence": "Apache-2.0"})
    second = saved.with_name("second.safetensors")
    save_module(second, Other(2))
    update_manifest(second, {"licence": "MIT", "trained_on": "Größen"})
    save_module(saved, Small(6))
    update_manifest(saved, {"licence": "Apache-2.0"})
    entries = yaml.safe_load(saved.with_name("manifest.yaml").read_text())
    for path in (saved, second):
        content = path.read_bytes()
        assert entries[path.name]["sha256"] == hashlib.sha256(content).hexdigest()
        assert entries[path.name]["bytes"] == len(content)
    assert list(entries) == sorted(entries)
    assert entries[second.name]["trained_on"] == "Größen"
    assert entries[saved.name]["licence"] == "Apache-2.0"


def test_metadata_is_json(saved: Path) -> None:
    header = saved.read_bytes()
    length = int.from_bytes(header[:8], "little")
    assert json.loads(header[8 : 8 + length])["__metadata__"]["hparams"] == '{"width": 4}'


def test_written_file_is_as_readable_as_any_other(tmp_path: Path) -> None:
    save_tensors(tmp_path / "a.safetensors", {"x": torch.ones(2)}, {})
    (tmp_path / "b").touch()
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "b").stat().st_mode
