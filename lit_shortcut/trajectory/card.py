"""Card of a set of trajectories: what the set holds and how it was made."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import sha256
from math import prod
from pathlib import Path
from tarfile import BLOCKSIZE
from typing import Any

from lit_shortcut.contracts import TokenSpec
from lit_shortcut.files import AccessError, read_bytes, whole
from lit_shortcut.trajectory.encoding import ENCODINGS, Encoding

FORMAT_VERSION = 3
_CARD = "card.json"
_MOST_SHARDS = 10**7  # their order takes 80 MB
_HEADERS, _OTHERS = 640, 8192  # bytes: headers before an array, a sample's other members


class TrajectoryError(ValueError):
    """A set of trajectories is missing, damaged, or not the expected one."""


def shard_name(index: int) -> str:
    """File name of shard ``index``."""
    return f"shard-{index:06d}.tar"


def locate(source: str | Path, name: str) -> str:
    """Path or URL of file ``name`` of the set at ``source``."""
    return f"{str(source).rstrip('/')}/{name}"


@dataclass(frozen=True)
class Card:
    """Contents of a set and how it was made: equal cards, equal bytes.

    Args:
        format_version: version of this schema.
        base: identity of the base, everything the features depend on; includes the ``fingerprint`` of its weights.
        interface: fingerprint of the interface kept beside the shards.
        spec: fields of the base's :class:`TokenSpec`.
        decoding: settings that tokens were drawn with.
        branches: G.
        num_steps: N.
        precision: Lightning's name of the precision the features were computed in (``32-true``, ``bf16-mixed``, …).
        encoding: key in ``ENCODINGS`` of how features are stored.
        text_rows: whether the features include rows of a text; S then differs between samples.
        num_samples: trajectories in the set.
        samples_per_shard: trajectories in every shard but the last, which holds the rest.
        seed: run seed, which each sample's seed is derived from.
        num_classes: number of classes, or of prompts, that the labels cycle through.
        prompts: sha256 of the list of prompts; empty for classes.
    """

    format_version: int
    base: dict[str, Any]
    interface: str
    spec: dict[str, Any]
    decoding: dict[str, Any]
    branches: int
    num_steps: int
    precision: str
    encoding: str
    text_rows: bool
    num_samples: int
    samples_per_shard: int
    seed: int
    num_classes: int
    prompts: str = ""

    def __post_init__(self) -> None:
        if type(self.base.get("fingerprint")) is not str:
            raise TrajectoryError(f"base: expected an identity with a fingerprint, found {self.base}")
        if self.encoding not in ENCODINGS:
            raise TrajectoryError(f"encoding: expected one of {', '.join(ENCODINGS)}, found {self.encoding!r}")
        if set(self.spec) != set(TokenSpec._fields) or not all(type(size) is int for size in self.spec.values()):
            raise TrajectoryError(f"spec: expected integers {', '.join(TokenSpec._fields)}, found {self.spec}")
        for name in ("branches", "num_steps", "num_samples", "samples_per_shard"):
            if getattr(self, name) < 1:
                raise TrajectoryError(f"{name}: expected at least 1, found {getattr(self, name)}")
        if self.num_shards > _MOST_SHARDS:
            raise TrajectoryError(f"num_samples: expected at most {_MOST_SHARDS} shards, found {self.num_shards}")

    @property
    def base_fingerprint(self) -> str:
        """Return the fingerprint of the base's weights."""
        return str(self.base["fingerprint"])

    @property
    def encoder(self) -> Encoding:
        """Return the encoding of the features."""
        return ENCODINGS[self.encoding]

    @property
    def num_shards(self) -> int:
        """Return the number of shards in the complete set."""
        return -(-self.num_samples // self.samples_per_shard)

    @property
    def sample_bytes(self) -> int:
        """Return the bytes of one trajectory on disk, rounded up by a few kB."""
        stored = self.encoder.members(self.spec["sequence_length"], self.spec["width"])
        sizes = (dtype.itemsize * prod(shape) for dtype, shape in stored.values())
        step = sum(-(-(size + _HEADERS) // BLOCKSIZE) * BLOCKSIZE for size in sizes)
        return self.branches * self.num_steps * step + 6 * self.spec["num_tokens"] + _OTHERS

    @cached_property
    def digest(self) -> str:
        """Return the first 16 hex digits of a sha256 over all fields; shards refer to their card by it."""
        return _digest(asdict(self))

    def ids(self, index: int) -> range:
        """Return the ids of the samples in shard ``index``."""
        start = index * self.samples_per_shard
        return range(start, min(start + self.samples_per_shard, self.num_samples))

    def write(self, folder: Path) -> None:
        """Write ``card.json`` into ``folder`` atomically."""
        with whole(folder / _CARD) as file:
            file.write((json.dumps(asdict(self) | {"digest": self.digest}, indent=2) + "\n").encode())

    @classmethod
    def read(cls, source: str | Path) -> Card:
        """Read the card of the set at ``source``.

        Raises:
            TrajectoryError: if it is missing, of another version, inconsistent, or changed since it was written.
            AccessError: if it cannot be fetched.
        """
        where = locate(source, _CARD)
        try:
            values = json.loads(read_bytes(where))
            version, digest = values.get("format_version"), values.pop("digest", None)
        except AccessError:
            raise
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            raise TrajectoryError(f"{where}: expected the card of a set of trajectories ({error})") from error
        if version != FORMAT_VERSION:
            raise TrajectoryError(
                f"{where}: format_version: expected {FORMAT_VERSION}, found {version!r}; record the set again"
            )
        if digest != _digest(values):
            raise TrajectoryError(f"{where}: changed since it was written; its digest is no longer {digest}")
        try:
            return cls(**values)
        except (TypeError, TrajectoryError) as error:
            raise TrajectoryError(f"{where}: {error}") from error


def _digest(values: dict[str, Any]) -> str:
    return sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
