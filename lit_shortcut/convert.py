"""Conversion of weight files: ``python -m lit_shortcut.convert --help``."""

from __future__ import annotations

from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from lit_shortcut.networks.llada_shortcut import NAMES as DIMOO_SHORTCUT
from lit_shortcut.networks.llada_shortcut import LLaDAShortcutNet
from lit_shortcut.networks.rows import Options
from lit_shortcut.networks.shortcut import NAMES as SHORTCUT
from lit_shortcut.networks.shortcut import ShortcutNet
from lit_shortcut.published import STATE_KEYS, save_published, state_in
from lit_shortcut.weights import WeightsError, first_sentence, load_module_with_metadata, save_tensors

_FREE = ("uses_time", "grid", "stride")  # the first shows in the tensors, the others change nothing by themselves
_PUBLISHED = {
    field.name: field.default for field in fields(Options) if field.default is not MISSING and field.name not in _FREE
}
"""Options of every published network: the defaults, so that an option added later is not forgotten."""


class Inert:
    """Placeholder for every object in a pickle that is not a tensor, number or text: accepts anything, does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def to_safetensors(source: Path, target: Path) -> None:
    """Extract the tensors of a published checkpoint that ``torch.load(weights_only=True)`` refuses.

    Other contents (callbacks of old Lightning versions, configurations) become inert placeholders: no code in the file
    is run, and no class it names is imported.

    Args:
        source: checkpoint that ``torch.save`` wrote.
        target: safetensors file to write.

    Raises:
        WeightsError: if the file is damaged, holds no state dict, or cannot be read in this way.
    """
    if not source.is_file():
        raise WeightsError(f"{source}: no such checkpoint")
    try:
        stand_ins: list[Any] = [(Inert, name) for name in get_unsafe_globals_in_checkpoint(source)]
        with safe_globals(stand_ins):
            content = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises errors of any type
        raise WeightsError(f"{source}: not readable without running its code ({first_sentence(error)})") from error
    state = state_in(content)
    if state is None:
        raise WeightsError(f"{source}: expected a state dict, or a dict with one at {' or '.join(STATE_KEYS)}")
    save_tensors(
        target, {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}, {}
    )


def to_published(source: Path, target: Path) -> None:
    """Write a shortcut trained here in the form of the MIGM-Shortcut release: a bare state dict with its names.

    Args:
        source: checkpoint (``.ckpt``) or exported safetensors file of fit.
        target: ``.pth`` file to write.

    Raises:
        WeightsError: if ``source`` is missing, damaged, not a shortcut, or a network that the release lacks.
    """
    network, _ = load_module_with_metadata((ShortcutNet, LLaDAShortcutNet), source)
    options = asdict(network.options)
    others = [f"{name} {options[name]}, not {value}" for name, value in _PUBLISHED.items() if options[name] != value]
    if others:
        raise WeightsError(f"{source}: the release's form has no place for {'; '.join(others)}")
    save_published(target, network, SHORTCUT if isinstance(network, ShortcutNet) else DIMOO_SHORTCUT)


if __name__ == "__main__":
    auto_cli([to_safetensors, to_published], as_positional=True)
