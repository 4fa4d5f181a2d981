"""Weight files: safetensors with the constructor's arguments, and a manifest of their origin."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Literal, TypeVar

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from lit_shortcut.files import replacing
from lit_shortcut.inputs import located
from lit_shortcut.invocation import command

Module = TypeVar("Module", bound=nn.Module)

Precision = Literal["bfloat16", "float16", "float32"]
"""Dtypes that weights can be loaded in."""


class WeightsError(ValueError):
    """A weight file is missing, damaged, or does not fit."""


def save_module(
    path: Path, module: nn.Module, metadata: dict[str, Any] | None = None, dtype: torch.dtype | None = None
) -> None:
    """Write ``module``'s state and its ``hparams`` to ``path`` atomically.

    Args:
        path: file to write, usually ``….safetensors``; its folder is created.
        module: network with ``hparams``, the arguments of its class.
        metadata: JSON values stored beside the tensors.
        dtype: of stored floating-point tensors; None keeps that of each. :func:`load_module` loads them in float32.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    if dtype is not None:
        tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    save_tensors(path, tensors, identity(module) | (metadata or {}))


def identity(module: nn.Module) -> dict[str, Any]:
    """Return the class name and ``hparams`` of ``module``, from which :func:`load_module` builds it again."""
    return {"class": type(module).__name__, "hparams": module.hparams}


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write ``tensors`` and JSON ``metadata`` to ``path`` atomically."""
    content = save(tensors, metadata={key: json.dumps(value) for key, value in metadata.items()})
    with replacing(path) as aside:  # save_file would leave a file that only its owner can read
        aside.write_bytes(content)


def require_writable(folder: Path) -> None:
    """Create ``folder`` and check that it is writable, before hours are spent on results to store there.

    Raises:
        OSError: naming the folder, if it cannot be created or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(error.errno, f"{folder}: cannot be written ({error.strerror or error})") from error


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and JSON metadata of the safetensors file at ``path``.

    Raises:
        WeightsError: if the file is missing, or not a complete safetensors file.
    """
    try:
        with safe_open(located(path), framework="pt") as file:
            metadata = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118 - not a dict
    except FileNotFoundError as error:
        raise WeightsError(f"{path}: no such weight file") from error
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise WeightsError(f"{path}: not a readable safetensors file ({error})") from error


def read_pickle(path: Path) -> Any:
    """Load the content that ``torch.save`` wrote to ``path``, without running pickled code.

    Raises:
        WeightsError: if the file is missing, damaged, or holds more than tensors, numbers and text.
    """
    try:
        return torch.load(located(path), map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise WeightsError(f"{path}: no such checkpoint") from error
    except Exception as error:  # a damaged pickle raises errors of any type
        raise WeightsError(
            f"{path}: not a checkpoint that loads with weights_only=True ({first_sentence(error)}). "
            "If it is complete and holds objects beside its tensors, extract the tensors: "
            f"python -m lit_shortcut.convert to_safetensors {path} {path.with_suffix('.safetensors')}"
        ) from error


def first_sentence(error: Exception) -> str:
    """Return the type and first sentence of ``error``, without torch's advice to load unsafely."""
    text = str(error).partition("WeightsUnpickler error:")[2] or str(error)
    sentence = re.split(r"[.] |[.]?\n", text.strip())[0]
    return f"{type(error).__name__}: {sentence}"


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Load the network in a checkpoint of one of this project's tasks, its EMA if there is one, and its metadata.

    Raises:
        WeightsError: if the file is missing, unreadable without running pickled code, or from another project.
    """
    checkpoint = read_pickle(path)
    if not isinstance(checkpoint, dict) or "network" not in checkpoint:
        raise WeightsError(f"{path}: not a checkpoint of a lit-shortcut task; it has no key 'network'")
    prefix = "network."
    state = {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
    return state, checkpoint["network"]


def load_module(cls: type[Module], path: Path) -> Module:
    """Load the ``cls`` that :func:`save_module` wrote to ``path``, or that a ``.ckpt`` holds, in eval mode and frozen.

    Raises:
        WeightsError: if the file is missing or damaged, holds another class, or its tensors do not fit.
    """
    return load_module_with_metadata((cls,), path)[0]


def load_module_with_metadata(classes: Sequence[type[Module]], path: Path) -> tuple[Module, dict[str, Any]]:
    """Load a module of one of ``classes`` as :func:`load_module` does; return it with the file's metadata."""
    tensors, metadata = load_checkpoint(path) if path.suffix == ".ckpt" else load_tensors(path)
    return build_module(classes, metadata, tensors, path), metadata


def build_module(
    classes: Sequence[type[Module]], identity: dict[str, Any], tensors: dict[str, Tensor], path: Path
) -> Module:
    """Build the module of :func:`identity` ``identity`` with state ``tensors``, in eval mode and frozen.

    Raises:
        WeightsError: naming ``path``, if its class is not one of ``classes``, or the tensors do not fit.
    """
    known = {cls.__name__: cls for cls in classes}
    found = identity.get("class")
    if found not in known:
        raise WeightsError(f"{path}: expected the weights of a {' or '.join(known)}, found {found!r}")
    try:
        module = known[found](**identity["hparams"])
        module.load_state_dict(tensors)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:  # missing, unknown or bad arguments; other tensors
        raise WeightsError(f"{path}: {error}") from error
    return module.eval().requires_grad_(False)


def fingerprint(tensors: dict[str, Tensor]) -> str:
    """Return the first 16 hex digits of a sha256 over names, types, shapes and bytes: equal only for equal weights."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.view(-1).view(dtype=torch.uint8).numpy().data)  # without a copy
    return digest.hexdigest()[:16]


def network_fingerprint(network: object) -> str:
    """Fingerprint of ``network``'s class and weights; of the class only, if it is not a module.

    >>> network_fingerprint(nn.Identity())
    'Identity:e3b0c44298fc1c14'
    """
    state = network.state_dict() if isinstance(network, nn.Module) else {}
    return f"{type(network).__name__}:{fingerprint(state)}"


def update_manifest(weights: Path, facts: dict[str, Any], manifest: Path | None = None) -> None:
    """Add ``weights`` to ``manifest``, by default that of its folder: size, sha256, this command and ``facts``.

    The same bytes keep the metrics they had if ``facts`` has none.
    """
    manifest = manifest or weights.with_name("manifest.yaml")
    written = yaml.safe_load(manifest.read_text(encoding="utf-8")) if manifest.exists() else None
    entries: dict[str, Any] = written or {}
    content, name = weights.read_bytes(), weights.relative_to(manifest.parent).as_posix()
    digest, before = hashlib.sha256(content).hexdigest(), entries.get(name, {})
    if before.get("sha256") == digest and not facts.get("metrics") and "metrics" in before:
        facts = facts | {"metrics": before["metrics"]}
    entries[name] = {"bytes": len(content), "sha256": digest, "made_by": command()} | facts
    with replacing(manifest) as aside:
        text = yaml.safe_dump(entries, sort_keys=True, allow_unicode=True, width=120)
        aside.write_text(text, encoding="utf-8")
