"""Interface of the base, kept beside the shards."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save

from lit_shortcut.files import read_bytes, whole
from lit_shortcut.interface import TokenInterface
from lit_shortcut.trajectory.card import Card, TrajectoryError, locate
from lit_shortcut.weights import WeightsError, fingerprint

_INTERFACE = "interface.safetensors"


def interface_fingerprint(interface: TokenInterface) -> str:
    """Return a digest that only equal interfaces share; the card of a set holds it."""
    return f"{interface.kind}:{fingerprint(interface.to_tensors())}"


def save_interface(folder: Path, interface: TokenInterface) -> None:
    """Write ``interface`` beside the shards in ``folder`` atomically."""
    with whole(folder / _INTERFACE) as file:
        file.write(save(interface.to_tensors(), metadata={"kind": json.dumps(interface.kind)}))


def load_interface(source: str | Path, card: Card) -> TokenInterface:
    """Load the interface of the set at ``source``, whose card is ``card``.

    Raises:
        WeightsError: if the file is missing or damaged.
        AccessError: if it cannot be fetched.
        TrajectoryError: if it does not hold the interface named by the card.
    """
    where, (kind, _, digest) = locate(source, _INTERFACE), card.interface.partition(":")
    try:
        tensors = load(read_bytes(where))
    except (FileNotFoundError, SafetensorError) as error:
        raise WeightsError(f"{where}: not a readable safetensors file ({error})") from error
    if (found := fingerprint(tensors)) != digest:
        raise TrajectoryError(f"{where}: expected the interface {digest} named by the card, found {found}")
    try:
        return TokenInterface.from_tensors(kind, tensors)
    except ValueError as error:
        raise TrajectoryError(f"{where}: {error}") from error
