"""Identity of a row: everything its values depend on, as JSON values to compare and print."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lit_shortcut.acceleration.shortcut import shortcut_of
from lit_shortcut.contracts import MaskedImageModel
from lit_shortcut.evaluation.rows import Row
from lit_shortcut.metrics.images import ImageMetric

_MISSING = "nothing"
_MOST_SHOWN = 80  # characters


def loop_identities(
    base: MaskedImageModel, rows: Sequence[Row], *, precision: str, compiled: bool | str
) -> dict[str, dict[str, Any]]:
    """Return, by row name, everything the decoding loop and its latency depend on.

    Args:
        base: the frozen model, in the precision it runs in.
        rows: ways to decode.
        precision: the trainer's precision.
        compiled: whether networks run through ``torch.compile``, or its mode.
    """
    shared = {"base": base.identity(), "dtype": dtype_of(base), "precision": precision, "compiled": compiled}
    own = {
        row.name: {"decoding": asdict(row.decoding), "acceleration": acceleration_identity(base, row)} for row in rows
    }
    return {name: _as_json(shared | identity) for name, identity in own.items()}


def acceleration_identity(base: MaskedImageModel, row: Row) -> dict[str, Any]:
    """Return the identity of the row's acceleration, with the dtype of its weights if that is not the base's."""
    identity, weights = row.acceleration.identity(), _dtypes(row.acceleration)
    return identity | ({"dtype": weights} if weights not in ("", dtype_of(base)) else {})


def row_identity(
    loop: Mapping[str, Any],
    conditions: Mapping[str, Any],
    metrics: Mapping[str, ImageMetric],
    originals: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return everything a row's values depend on but the run seed.

    Args:
        loop: the row's entry of :func:`loop_identities`.
        conditions: identity of the conditions.
        metrics: image metrics by name.
        originals: the entry of the row whose images ``metrics`` compare with; None if none does.
    """
    measured = {name: metric.identity() for name, metric in metrics.items()}
    compared = {} if originals is None else {"originals": dict(originals)}
    return dict(loop) | _as_json({"conditions": dict(conditions), "metrics": measured} | compared)


def log_trained_otherwise(rows: Iterable[Row]) -> None:
    """Log where the decoding of ``rows`` differs from that of the trajectories that their shortcuts were trained on."""
    for row in rows:
        if (shortcut := shortcut_of(row.acceleration)) is not None:
            recorded, own = dict(shortcut.origin.decoding), _as_json(asdict(row.decoding))
            if changes := differences(recorded, {name: own[name] for name in recorded if name in own}):
                rank_zero_info(f"{row.name}: not drawn as its shortcut's trajectories were: {'; '.join(changes)}")


def dtype_of(base: MaskedImageModel) -> str:
    """Return the dtypes of the base's weights, such as ``bfloat16``."""
    return _dtypes(base) or _name(base.interface.code_embedding.dtype)


def computed_in(base: MaskedImageModel, precision: str) -> str:
    """Return what the features of ``base`` are computed in under the trainer's ``precision``, such as ``bfloat16``.

    The weights decide, since a trainer in ``32-true`` leaves those of a base loaded in bfloat16 as they are; a mixed
    precision is named beside them.
    """
    dtype = _name(base.interface.code_embedding.dtype)
    return f"{precision} on {dtype} weights" if precision.endswith("mixed") else dtype


def _dtypes(module: object) -> str:
    tensors = module.parameters() if isinstance(module, nn.Module) else ()
    return "+".join(sorted({_name(tensor.dtype) for tensor in tensors}))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def differences(before: object, after: object, path: str = "") -> list[str]:
    """Return where two identities differ: path and both values.

    >>> differences({"base": {"template": "{}"}, "n": 1}, {"base": {"template": "a {}"}, "n": 1})
    ["base.template was '{}' and is 'a {}'"]
    """
    if isinstance(before, dict) and isinstance(after, dict):
        found = []
        for key in dict.fromkeys([*before, *after]):
            inside = f"{path}.{key}" if path else str(key)
            found += differences(before.get(key, _MISSING), after.get(key, _MISSING), inside)
        return found
    return [] if before == after else [f"{path} was {_short(before)} and is {_short(after)}"]


def _short(value: object) -> str:
    text = str(value if value == _MISSING else repr(value))
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}…"


def _as_json(value: dict[str, Any]) -> dict[str, Any]:
    """Return ``value`` as a file would give it back, with lists for tuples."""
    plain: dict[str, Any] = json.loads(json.dumps(value))
    return plain
