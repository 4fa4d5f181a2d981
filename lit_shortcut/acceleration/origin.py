"""Origin of a shortcut: its base and the decoding it was trained for, stored in ``config.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from lit_shortcut.files import replacing
from lit_shortcut.weights import WeightsError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
PLAN = "plan.json"
CARD = "README.md"

_FORMAT_VERSION = 1


@dataclass(frozen=True)
class BaseReference:
    """The base that a shortcut belongs to.

    Args:
        fingerprint: fingerprint of its weights; empty if the shortcut's file lacks it.
        name: name for :func:`lit_shortcut.load`: ``dimoo``, ``maskgit``, …; empty for a base of one's own.
        source: ``hf://`` address of its weights, or a folder relative to the shortcut's.
        revision: revision of the hub's repository; empty for the newest.
        arguments: further arguments of the function that builds it.
    """

    fingerprint: str = ""
    name: str = ""
    source: str = ""
    revision: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Origin:
    """Training data and intended use of a shortcut.

    Args:
        base: the base that recorded the trajectories.
        num_steps: N of the trajectories; 0 if the file lacks it.
        decoding: settings of the trajectories, arguments of :class:`~lit_shortcut.sampling.Decoding`.
        plan: name of the intended plan, ``even``, ``early`` or ``calibrated``.
        budget: b of that plan; 0 leaves it to the user.
        licence: SPDX identifier of the weights.
        trained_on: the data.
        num_classes: classes of the base; 0 if it takes prompts.
    """

    base: BaseReference = field(default_factory=BaseReference)
    num_steps: int = 0
    decoding: Mapping[str, Any] = field(default_factory=dict)
    plan: str = "even"
    budget: int = 0
    licence: str = ""
    trained_on: str = ""
    num_classes: int = 0

    @classmethod
    def of_metadata(cls, metadata: Mapping[str, Any]) -> Origin:
        """Return the origin in the metadata of a checkpoint or safetensors file, the card of its trajectories."""
        base = BaseReference(metadata.get("base_fingerprint") or "")
        num_classes = metadata.get("spec", {}).get("num_classes", 0)
        return cls(base, metadata.get("num_steps", 0), metadata.get("decoding", {}), num_classes=num_classes)

    def require_steps(self, num_steps: int) -> None:
        """Check that the shortcut was trained for runs of ``num_steps``.

        Raises:
            WeightsError: if it was trained for another number of steps.
        """
        if self.num_steps not in (0, num_steps):
            raise WeightsError(
                f"this shortcut was trained on runs of num_steps {self.num_steps}, it cannot accelerate one of "
                f"{num_steps}; budget {num_steps} runs the base at every step"
            )


Record = TypeVar("Record", BaseReference, Origin)


def write_config(folder: Path, network: dict[str, Any], origin: Origin) -> None:
    """Write ``config.json``: class and ``hparams`` of the ``network``, and ``origin``."""
    content = {"format_version": _FORMAT_VERSION, "network": network} | asdict(origin)
    with replacing(folder / CONFIG) as aside:
        aside.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_config(folder: Path) -> tuple[dict[str, Any], Origin]:
    """Read class and ``hparams`` of the network, and the origin, from ``config.json`` in ``folder``.

    Raises:
        WeightsError: naming file and key, if the file is missing or damaged, or a key is missing, unknown or of another
            type.
    """
    path = folder / CONFIG
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise WeightsError(f"{path}: no such file; expected the folder of a shortcut ({error.strerror})") from error
    except ValueError as error:
        raise WeightsError(f"{path}: not a JSON file ({error})") from error
    if not isinstance(content, dict) or content.pop("format_version", None) != _FORMAT_VERSION:
        raise WeightsError(f"{path}: expected the configuration of a shortcut, of format_version {_FORMAT_VERSION}")
    network = content.pop("network", None)
    if not isinstance(network, dict) or network.keys() != {"class", "hparams"}:
        raise WeightsError(f"{path}: network must have the keys class and hparams, found {network!r}")
    content["base"] = _filled(BaseReference, content.get("base"), path, "base.")
    return network, _filled(Origin, content, path, "")


def _filled(record: type[Record], content: Any, path: Path, prefix: str) -> Record:
    """Return the ``record`` with the fields in ``content``, each of the type of the field's default."""
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: {prefix.rstrip('.')} must be an object, found {content!r}")
    expected = {one.name: type(getattr(record(), one.name)) for one in fields(record)}
    for name, value in content.items():
        if name not in expected:
            raise WeightsError(f"{path}: {prefix}{name} is unknown; known are {', '.join(expected)}")
        if type(value) is not expected[name]:
            raise WeightsError(f"{path}: {prefix}{name} must be of type {expected[name].__name__}, found {value!r}")
    return record(**content)
