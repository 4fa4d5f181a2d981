"""Models in the folders that diffusers and transformers save: ``config.json`` and safetensors files."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import ModelMixin
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lit_shortcut.published import Names, fill
from lit_shortcut.weights import WeightsError

Variant = Literal["fp16"]

DIFFUSERS, TRANSFORMERS = "diffusion_pytorch_model", "model"
"""Beginnings of the names of weight files."""


def file_patterns(folder: str, stem: str, variant: Variant | None) -> list[str]:
    """File patterns to download of ``folder`` in a repository ("" is its root): configuration and weights."""
    single = _single(stem, variant)
    names = ("config.json", _index(stem, variant), single, f"{single.removesuffix('.safetensors')}-*.safetensors")
    return [f"{folder}/{name}" if folder else name for name in names]


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object at ``path``.

    Raises:
        WeightsError: if the file is missing, or holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise WeightsError(f"{path}: no such file; expected a folder of the published checkpoint") from error
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path}: not a readable JSON file ({error})") from error
    if not isinstance(values, dict):
        raise WeightsError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


def read_weights(
    folder: Path, stem: str, variant: Variant | None = None, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Tensors of the safetensors file ``stem`` in ``folder``, or of all the files its index names.

    Args:
        folder: folder of a saved model.
        stem: beginning of the names of its weight files.
        variant: variant of the weights; None takes the plain ones or, if there are none, half precision.
        dtype: dtype of the tensors; those stored in it are mapped from the files and not copied.

    Raises:
        WeightsError: if a file is missing or damaged. Pickled weights are not read.
    """
    if variant is None and not _is_there(folder, stem, None) and _is_there(folder, stem, "fp16"):
        variant = "fp16"
    index, single = folder / _index(stem, variant), _single(stem, variant)
    places = read_json(index).get("weight_map", {}) if index.is_file() else {"": single}
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise WeightsError(f"{index}: weight_map: expected an object of file names, found {places!r}")
    shards = sorted(set(places.values()))
    missing = [name for name in shards if not (folder / name).is_file()]
    if missing or not shards:
        raise WeightsError(
            f"{folder}: {len(missing)} of {len(shards)} weight files are missing: {', '.join(missing)}; expected "
            f"{single}, or all files named in {index.name}"
        )
    state: dict[str, Tensor] = {}
    for name in shards:
        try:
            with safe_open(folder / name, framework="pt") as file:
                state |= {key: file.get_tensor(key).to(dtype) for key in file.keys()}  # noqa: SIM118 - not a dict
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{folder / name}: not a readable safetensors file ({error})") from error
    return state


def build(cls: type[ModelMixin], folder: Path, dtype: torch.dtype = torch.float32) -> ModelMixin:
    """Build the model of diffusers that ``config.json`` in ``folder`` describes, on the meta device.

    Args:
        cls: class of the model.
        folder: folder of a saved model.
        dtype: dtype of its tensors.

    Raises:
        WeightsError: if the file is missing or damaged, or describes another model.
    """
    path = folder / "config.json"
    config = read_json(path)
    if (found := config.get("_class_name", cls.__name__)) != cls.__name__:
        raise WeightsError(f"{path}: _class_name: expected {cls.__name__}, found {found!r}")
    try:
        with torch.device("meta"):
            return cast(cls.from_config(config), dtype)
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise WeightsError(f"{path}: not the configuration of a {cls.__name__} ({error})") from error


def cast(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Convert ``module`` of diffusers to ``dtype``, without the needless warning of its own ``to``."""
    return nn.Module.to(module, dtype)


def take(module: nn.Module, state: dict[str, Tensor], folder: Path, but_for: Iterable[str] = ()) -> None:
    """Load ``state`` of ``folder`` into ``module``, frozen and in eval mode, but for names that begin with ``but_for``.

    Raises:
        WeightsError: if tensors are missing, unknown or misshapen; all of them are named.
    """
    fill(module, state, Names([]), folder, but_for)


def _single(stem: str, variant: Variant | None) -> str:
    return f"{stem}.{variant}.safetensors" if variant else f"{stem}.safetensors"


def _index(stem: str, variant: Variant | None) -> str:
    return f"{stem}.safetensors.index.{variant}.json" if variant else f"{stem}.safetensors.index.json"


def _is_there(folder: Path, stem: str, variant: Variant | None) -> bool:
    return any((folder / name(stem, variant)).is_file() for name in (_single, _index))
