"""What lies beside a shard: its size and the checksums of all that is read from it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from xxhash import xxh3_64

from lit_shortcut.trajectory.card import Card
from lit_shortcut.trajectory.files import TrajectoryError, read_small, shard_name, whole

_LIMIT = 2**28  # bytes; a real one has 25 for each step of each branch


class Checksums(NamedTuple):
    """xxh3_64 in hex of a sample's parts, each of which can be read alone.

    ``facts`` of its JSON member; ``rest`` of its safetensors member without features and their scales; ``steps`` of
    the features at each step, branch by branch, with their scales behind them.
    """

    facts: str
    rest: str
    steps: list[str]


@dataclass(frozen=True)
class Sidecar:
    """``shard-000000.json``: ``bytes`` and ``sha256`` of the whole shard, and for each sample its ``checksums``.

    ``card`` is the digest of the card that the shard belongs to.
    """

    card: str
    bytes: int
    sha256: str
    checksums: list[Checksums]

    def write(self, shard: Path) -> None:
        """Write it beside ``shard``, whole or not at all."""
        with whole(shard.with_suffix(".json")) as file:
            file.write(json.dumps(asdict(self)).encode())

    @classmethod
    def read(cls, where: str, index: int, card: Card) -> Sidecar:
        """That at path or URL ``where``, of shard ``index``.

        Raises:
            TrajectoryError: if it is missing, no JSON, of another set, or does not count what ``card`` does.
        """
        try:
            values = json.loads(read_small(where, _LIMIT))
            sidecar = cls(**values | {"checksums": [Checksums(*one) for one in values["checksums"]]})
            whole_numbers = type(sidecar.bytes) is int and type(sidecar.sha256) is str
            counts = {len(one.steps) for one in sidecar.checksums}
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            if isinstance(error, TrajectoryError):
                raise
            raise TrajectoryError(f"{where}: expected size and checksums of {shard_name(index)} ({error})") from error
        if sidecar.card != card.digest:
            raise TrajectoryError(f"{where}: expected a shard of set {card.digest}, found one of {sidecar.card}")
        samples, steps = len(card.ids(index)), card.branches * card.num_steps
        if len(sidecar.checksums) != samples or counts != {steps} or not whole_numbers:
            raise TrajectoryError(
                f"{where}: expected the size of {shard_name(index)} and checksums of {samples} samples of "
                f"{card.branches} × {card.num_steps} steps, found others"
            )
        return sidecar


def checksum(*parts: bytes | bytearray | memoryview) -> str:
    """xxh3_64 of ``parts``, one behind the other, in hex."""
    digest = xxh3_64()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
