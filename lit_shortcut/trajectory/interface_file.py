"""Interface of the base, kept beside the shards."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors.torch import save
from torch import Tensor

from lit_shortcut.files import fetch, is_remote, whole
from lit_shortcut.interface import TokenInterface
from lit_shortcut.trajectory.card import Card, TrajectoryError, locate
from lit_shortcut.weights import fingerprint, load_tensors

_INTERFACE = "interface.safetensors"


def interface_fingerprint(interface: TokenInterface) -> str:
    """Return a digest that only equal interfaces share; the card of a set holds it."""
    return _fingerprint(interface.kind, interface.to_tensors())


def save_interface(folder: Path, interface: TokenInterface) -> None:
    """Write ``interface`` beside the shards in ``folder`` atomically."""
    with whole(folder / _INTERFACE) as file:
        file.write(save(interface.to_tensors(), metadata={"kind": json.dumps(interface.kind)}))


def load_interface(source: str | Path, card: Card) -> TokenInterface:
    """Load the interface of the set at ``source``, whose card is ``card``.

    Raises:
        WeightsError: if the file is missing or damaged.
        TrajectoryError: if it does not hold the interface named by the card.
    """
    where = locate(source, _INTERFACE)
    with TemporaryDirectory() as scratch:
        path = Path(where)
        if is_remote(where):
            path = Path(scratch) / _INTERFACE
            fetch(where, path)
        tensors, metadata = load_tensors(path)
    kind = metadata.get("kind", "")
    if (found := _fingerprint(kind, tensors)) != card.interface:
        raise TrajectoryError(f"{where}: expected the interface {card.interface} named by the card, found {found}")
    try:
        return TokenInterface.from_tensors(kind, tensors)
    except ValueError as error:
        raise TrajectoryError(f"{where}: {error}") from error


def _fingerprint(kind: str, tensors: dict[str, Tensor]) -> str:
    return f"{kind}:{fingerprint(tensors)}"
