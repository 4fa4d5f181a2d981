"""Weight files: safetensors with the constructor's arguments inside, and a manifest that says where they come from."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, TypeVar

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lit_shortcut.files import replacing
from lit_shortcut.places import located

Module = TypeVar("Module", bound=nn.Module)


class WeightsError(ValueError):
    """A weight file is missing, damaged, or does not belong to what asked for it."""


def save_module(path: Path, module: nn.Module, metadata: dict[str, Any] | None = None) -> None:
    """Write ``module``'s state and its ``hparams`` to ``path``, whole or not at all.

    Args:
        path: file to write, usually ``….safetensors``; its folder is made.
        module: has ``hparams``, the arguments its class is built from.
        metadata: JSON values kept beside the tensors.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    save_tensors(path, tensors, identity(module) | (metadata or {}))


def identity(module: nn.Module) -> dict[str, Any]:
    """What :func:`load_module` needs to build ``module`` again: the name of its class and its ``hparams``."""
    return {"class": type(module).__name__, "hparams": module.hparams}


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write ``tensors`` and JSON ``metadata`` to ``path``: aside first, then renamed into place."""
    with replacing(path) as aside:
        save_file(tensors, aside, metadata={key: json.dumps(value) for key, value in metadata.items()})


def require_writable(folder: Path) -> None:
    """Make ``folder`` and write there, before hours are spent on what would be written in the end.

    Raises:
        OSError: naming the folder, if it cannot be made or written.
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
        WeightsError: if the file is missing, unreadable, or no whole safetensors file.
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
    """What ``torch.save`` wrote to ``path``, as far as that needs no pickled code.

    Raises:
        WeightsError: if the file is missing, damaged, or holds more than tensors, numbers and text.
    """
    try:
        return torch.load(located(path), map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise WeightsError(f"{path}: no such checkpoint") from error
    except Exception as error:  # a damaged pickle fails in whatever way it was damaged
        raise WeightsError(
            f"{path}: not a checkpoint that loads with weights_only=True ({first_sentence(error)}). "
            "If it is whole and holds objects beside its tensors, keep the tensors alone: "
            f"python -m lit_shortcut.convert to_safetensors {path} {path.with_suffix('.safetensors')}"
        ) from error


def first_sentence(error: Exception) -> str:
    """What ``error`` of torch says, without the advice to load unsafely that surrounds it."""
    text = str(error).partition("WeightsUnpickler error:")[2] or str(error)
    sentence = re.split(r"[.] |[.]?\n", text.strip())[0]
    return f"{type(error).__name__}: {sentence}"


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The network in a checkpoint of one of this project's tasks, averaged where an EMA ran, and its metadata.

    Raises:
        WeightsError: if the file is missing, unreadable without running pickled code, or of another project.
    """
    checkpoint = read_pickle(path)
    if not isinstance(checkpoint, dict) or "network" not in checkpoint:
        raise WeightsError(f"{path}: not a checkpoint of a lit-shortcut task; it has no key 'network'")
    prefix = "network."
    state = {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
    return state, checkpoint["network"]


def load_module(cls: type[Module], path: Path) -> Module:
    """The ``cls`` that :func:`save_module` wrote to ``path``, or that a ``.ckpt`` holds, in eval mode and frozen.

    Raises:
        WeightsError: if the file is missing or damaged, holds another class, or its tensors do not fit.
    """
    return load_module_with_metadata((cls,), path)[0]


def load_module_with_metadata(classes: Sequence[type[Module]], path: Path) -> tuple[Module, dict[str, Any]]:
    """As :func:`load_module`, of whichever of ``classes`` it is, with the metadata kept beside the tensors."""
    tensors, metadata = load_checkpoint(path) if path.suffix == ".ckpt" else load_tensors(path)
    return build_module(classes, metadata, tensors, path), metadata


def build_module(
    classes: Sequence[type[Module]], identity: dict[str, Any], tensors: dict[str, Tensor], path: Path
) -> Module:
    """Return the module of :func:`identity` ``identity`` with state ``tensors``, in eval mode and frozen.

    Raises:
        WeightsError: if it is none of ``classes``, or the tensors do not fit; the message names ``path``.
    """
    known = {cls.__name__: cls for cls in classes}
    found = identity.get("class")
    if found not in known:
        raise WeightsError(f"{path}: expected the weights of a {' or '.join(known)}, found {found!r}")
    try:
        module = known[found](**identity["hparams"])
        module.load_state_dict(tensors)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:  # no, other or wrong arguments; other tensors
        raise WeightsError(f"{path}: {error}") from error
    return module.eval().requires_grad_(False)


def fingerprint(tensors: dict[str, Tensor]) -> str:
    """First 16 hex digits of a sha256 over names, types, shapes and bytes: equal only for equal weights."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.view(-1).view(dtype=torch.uint8).numpy().data)  # the bytes themselves, not a copy
    return digest.hexdigest()[:16]


def network_fingerprint(network: object) -> str:
    """Fingerprint of ``network``'s class and weights; only that of the class if it is no module.

    >>> network_fingerprint(nn.Identity())
    'Identity:e3b0c44298fc1c14'
    """
    state = network.state_dict() if isinstance(network, nn.Module) else {}
    return f"{type(network).__name__}:{fingerprint(state)}"


def update_manifest(weights: Path, facts: dict[str, Any], manifest: Path | None = None) -> None:
    """Enter ``weights`` into ``manifest``, by default the one of its folder: size, sha256, this command, ``facts``."""
    manifest = manifest or weights.with_name("manifest.yaml")
    entries: dict[str, Any] = yaml.safe_load(manifest.read_text()) if manifest.exists() else {}
    content = weights.read_bytes()
    entries[weights.relative_to(manifest.parent).as_posix()] = {
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "made_by": " ".join(["lightning", *sys.argv[1:]]),
    } | facts
    manifest.write_text(yaml.safe_dump(entries, sort_keys=True, allow_unicode=True, width=120))
