"""The card of a set of trajectories: what the set holds and how it was made."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import torch

from lit_shortcut.contracts import TokenSpec
from lit_shortcut.trajectory.encoding import DTYPES, row_bytes
from lit_shortcut.trajectory.files import TrajectoryError, locate, read_small, whole

FORMAT_VERSION = 2
_CARD = "card.json"
_LIMIT = 2**20  # bytes of a card; real ones have a thousand
_MOST = 2**53  # of any count; below what len() of a range can tell
_HEADERS = 4096  # bytes a sample takes beside its tensors: two tar headers, a JSON file, padding


@dataclass(frozen=True)
class Card:
    """What a set holds and how it was made; equal cards, equal sets.

    Args:
        format_version: of this schema.
        base_fingerprint: of the base that computed the features.
        interface: fingerprint of the interface kept beside the shards.
        spec: fields of the base's :class:`TokenSpec`.
        decoding: how tokens were drawn.
        branches: G.
        num_steps: N.
        dtype: of the features as stored, a key of ``DTYPES``.
        num_samples: trajectories in the set.
        samples_per_shard: in every shard but the last, which holds what is left.
        seed: of the run; each sample's own comes from it.
        num_classes: labels went round so many classes, or prompts.
        prompts: sha256 of the list of prompts; empty where classes were asked for.
    """

    format_version: int
    base_fingerprint: str
    interface: str
    spec: dict[str, Any]
    decoding: dict[str, Any]
    branches: int
    num_steps: int
    dtype: str
    num_samples: int
    samples_per_shard: int
    seed: int
    num_classes: int
    prompts: str = ""

    def __post_init__(self) -> None:
        if self.format_version != FORMAT_VERSION:
            raise TrajectoryError(_other_version(self.format_version))
        if self.dtype not in DTYPES:
            raise TrajectoryError(f"dtype: expected one of {', '.join(DTYPES)}, found {self.dtype!r}")
        if set(self.spec) != set(TokenSpec._fields) or not all(type(size) is int for size in self.spec.values()):
            raise TrajectoryError(f"spec: expected integers {', '.join(TokenSpec._fields)}, found {self.spec}")
        for name in ("branches", "num_steps", "num_samples", "samples_per_shard"):
            if not 1 <= getattr(self, name) <= _MOST:
                bound = f"at least 1, found {getattr(self, name)}" if getattr(self, name) < 1 else f"at most {_MOST}"
                raise TrajectoryError(f"{name}: expected {bound}")

    @property
    def num_shards(self) -> int:
        """Shards of the complete set."""
        return -(-self.num_samples // self.samples_per_shard)

    @property
    def features_shape(self) -> tuple[int, int, int, int]:
        """(G, N, S, C) of one trajectory; S at most so long where prompts differ."""
        return self.branches, self.num_steps, self.spec["sequence_length"], self.spec["width"]

    @property
    def sample_bytes(self) -> int:
        """Size of one trajectory on disk, rounded up by a few kB."""
        grid = self.spec["num_tokens"] * (torch.int32.itemsize + torch.int16.itemsize)
        return int(prod(self.features_shape[:3]) * row_bytes(self.spec["width"], self.dtype) + grid + _HEADERS)

    @cached_property
    def digest(self) -> str:
        """First 16 hex digits of a sha256 over all fields; shards name the card they belong to by it."""
        return sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    def ids(self, index: int) -> range:
        """Ids of the samples in shard ``index``."""
        start = index * self.samples_per_shard
        return range(start, min(start + self.samples_per_shard, self.num_samples))

    def write(self, folder: Path) -> None:
        """Write ``card.json`` into ``folder``, whole or not at all."""
        with whole(folder / _CARD) as file:
            file.write((json.dumps(asdict(self) | {"digest": self.digest}, indent=2) + "\n").encode())

    @classmethod
    def read(cls, source: str | Path) -> Card:
        """The card of the set at ``source``.

        Raises:
            TrajectoryError: if it is missing, no JSON, of another version, changed since it was written, or a key is
                missing or of a wrong type.
        """
        where = locate(source, _CARD)
        try:
            values = json.loads(read_small(where, _LIMIT))
        except OSError as error:
            raise TrajectoryError(f"{where}: expected the card of a set of trajectories ({error})") from error
        except (ValueError, RecursionError) as error:
            raise (
                error if isinstance(error, TrajectoryError) else TrajectoryError(f"{where}: expected JSON ({error})")
            ) from error
        if not isinstance(values, dict):
            raise TrajectoryError(f"{where}: expected a JSON object, found {type(values).__name__}")
        if values.get("format_version") != FORMAT_VERSION:
            raise TrajectoryError(f"{where}: {_other_version(values.get('format_version'))}")
        digest = values.pop("digest", None)
        kinds = {name: get_origin(hint) or hint for name, hint in get_type_hints(cls).items()}
        for name in sorted(kinds.keys() ^ values.keys()):
            raise TrajectoryError(f"{where}: {name}: " + ("missing" if name in kinds else "no key of a card"))
        for name, kind in kinds.items():
            if type(values[name]) is not kind:
                raise TrajectoryError(f"{where}: {name}: expected {kind.__name__}, found {values[name]!r}")
        try:
            card = cls(**values)
        except TrajectoryError as error:
            raise TrajectoryError(f"{where}: {error}") from error
        if digest != card.digest:
            raise TrajectoryError(
                f"{where}: changed since it was written: expected digest {card.digest}, found {digest}"
            )
        return card


def _other_version(found: object) -> str:
    return f"format_version: expected {FORMAT_VERSION}, found {found!r}; record the set anew"
