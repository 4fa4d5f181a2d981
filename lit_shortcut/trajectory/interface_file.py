"""The interface of the base, kept beside the shards."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save
from torch import Tensor

from lit_shortcut.files import fetch, is_remote, whole
from lit_shortcut.interface import TokenInterface
from lit_shortcut.trajectory.card import Card, TrajectoryError, locate
from lit_shortcut.weights import fingerprint, load_tensors

_INTERFACE = "interface.safetensors"


def interface_fingerprint(interface: TokenInterface) -> str:
    """A digest that only equal interfaces share; the card of a set holds it."""
    return fingerprint(_tensors(interface))


def save_interface(folder: Path, interface: TokenInterface) -> None:
    """Write ``interface`` beside the shards in ``folder``, whole or not at all."""
    with whole(folder / _INTERFACE) as file:
        file.write(save(_tensors(interface)))


def load_interface(source: str | Path, card: Card) -> TokenInterface:
    """The interface of the set at ``source``, whose card is ``card``.

    Raises:
        WeightsError: if the file is missing or damaged.
        TrajectoryError: if it does not hold the interface that the card names.
    """
    where = locate(source, _INTERFACE)
    with TemporaryDirectory() as scratch:
        path = Path(where)
        if is_remote(where):
            path = Path(scratch) / _INTERFACE
            fetch(where, path)
        tensors, _ = load_tensors(path)
    if (found := fingerprint(tensors)) != card.interface:
        raise TrajectoryError(f"{where}: expected the interface {card.interface} that the card names, found {found}")
    return TokenInterface(int(tensors.pop("num_tokens")), **tensors)


def _tensors(interface: TokenInterface) -> dict[str, Tensor]:
    tensors = {  # cloned, because a base may tie embedding and head, and safetensors refuses shared memory
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in interface.state_dict().items()
    }
    return tensors | {"num_tokens": torch.tensor(interface.num_tokens)}
