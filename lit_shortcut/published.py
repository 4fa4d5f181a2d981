"""Weights published elsewhere: names of their tensors and ours, strict loading, and saving in the published form."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lit_shortcut.files import replacing
from lit_shortcut.weights import WeightsError, load_tensors, read_pickle

Module = TypeVar("Module", bound=nn.Module)

STATE_KEYS = ("model_state_dict", "state_dict", "model")  # in MaskGIT's, Lightning's and LlamaGen's checkpoints
_WRAPPERS = re.compile(r"^((module|_orig_mod)\.)+")  # prefixes from distributed training and torch.compile


class Names:
    """Two spellings of the names of a network's tensors.

    Args:
        pairs: published prefixes and ours, with ``#`` for a number; the first that fits is replaced. Names that no pair
            fits stay the same.

    >>> names = Names([("up.#.block.", "ups.#.")])
    >>> names.ours("up.2.block.bias"), names.published("ups.2.bias"), names.ours("other")
    ('ups.2.bias', 'up.2.block.bias', 'other')
    """

    def __init__(self, pairs: Iterable[tuple[str, str]]) -> None:
        self._pairs = list(pairs)

    def ours(self, name: str) -> str:
        """Our spelling of the published ``name``."""
        return _respelled(name, self._pairs)

    def published(self, name: str) -> str:
        """The published spelling of our ``name``."""
        return _respelled(name, [(published, ours) for ours, published in self._pairs])


def _respelled(name: str, pairs: list[tuple[str, str]]) -> str:
    for before, after in pairs:
        pattern = re.escape(before).replace(r"\#", r"(\d+)")
        if match := re.match(pattern, name):
            numbers = iter(match.groups())
            return re.sub("#", lambda _: next(numbers), after) + name[match.end() :]  # noqa: B023 - called here
    return name


def state_in(content: Any) -> dict[str, Tensor] | None:
    """Return the state dict that ``content`` of a checkpoint is, or holds under a usual key; None if there is none."""
    if not isinstance(content, dict):
        return None
    state = next((content[key] for key in STATE_KEYS if key in content), content)
    holds_tensors = isinstance(state, dict) and all(isinstance(value, Tensor) for value in state.values())
    return state if state and holds_tensors else None


def load_state(path: Path) -> dict[str, Tensor]:
    """Load the tensors of the published checkpoint at ``path`` under their names, without running pickled code.

    The file is a state dict or has one at ``model_state_dict``, ``state_dict`` or ``model``; or it is a safetensors
    file written by :mod:`lit_shortcut.convert`. Prefixes from distributed training and ``torch.compile`` are dropped.

    Raises:
        WeightsError: if the file is missing, damaged, holds more than tensors, numbers and text, or no state dict.
    """
    if path.suffix == ".safetensors":
        return unwrapped(load_tensors(path)[0])
    content = read_pickle(path)
    state = state_in(content)
    if state is None:
        found = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise WeightsError(
            f"{path}: expected a state dict, or a dict with one at {' or '.join(map(repr, STATE_KEYS))}; found {found}"
        )
    return unwrapped(state)


def unwrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return ``state`` without the prefixes of distributed training and ``torch.compile``."""
    bare = {_WRAPPERS.sub("", name): tensor for name, tensor in state.items()}
    return bare if len(bare) == len(state) else state


def filled(
    make: Callable[[], Module], state: dict[str, Tensor], names: Names, path: Path, but_for: Iterable[str] = ()
) -> Module:
    """Call ``make`` on the meta device and :func:`fill` the module it returns, so that weights are in memory once."""
    with torch.device("meta"):
        module = make()
    fill(module, state, names, path, but_for)
    return module


def fill(module: nn.Module, state: dict[str, Tensor], names: Names, path: Path, but_for: Iterable[str] = ()) -> None:
    """Load the published ``state`` into ``module``, freeze it and put it in eval mode.

    Tensors are assigned, not copied. Shapes may differ in dimensions of size 1, of which published files have more (1×1
    convolutions, a batch of positions).

    Args:
        module: network with our names.
        state: tensors by published name.
        names: both spellings.
        path: origin of ``state``, for the message.
        but_for: beginnings of published names to leave out.

    Raises:
        WeightsError: if tensors are missing, unknown or misshapen, naming all of them as in the file.
    """
    expected = module.state_dict()
    left_out = tuple(but_for)
    found = {names.ours(name): tensor for name, tensor in state.items() if not name.startswith(left_out)}
    problems = [
        *(
            f"{names.published(name)} is missing, expected {_shape(expected[name])}"
            for name in sorted(expected.keys() - found.keys())
        ),
        *(f"{names.published(name)} is unknown" for name in sorted(found.keys() - expected.keys())),
        *(
            f"{names.published(name)} has shape {_shape(found[name])}, expected {_shape(expected[name])}"
            for name in sorted(expected.keys() & found.keys())
            if _without_ones(expected[name]) != _without_ones(found[name])
        ),
    ]
    if problems:
        sizes = ", ".join(f"{name} {value}" for name, value in getattr(module, "hparams", {}).items())
        kind = type(module).__name__ + (f" with {sizes}" if sizes else "")
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise WeightsError(f"{path}: not the weights of a {kind}:\n{listed}")
    module.load_state_dict(
        {name: tensor.reshape(expected[name].shape).to(expected[name].dtype) for name, tensor in found.items()},
        assign=True,
    )
    module.eval().requires_grad_(False)


def save_published(path: Path, module: nn.Module, names: Names) -> None:
    """Write ``module`` to ``path`` as a bare pickled state dict with published ``names``."""
    state = {names.published(name): tensor.detach().cpu().clone() for name, tensor in module.state_dict().items()}
    with replacing(path) as aside:
        torch.save(state, aside)


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _without_ones(tensor: Tensor) -> list[int]:
    return [size for size in tensor.shape if size != 1]
