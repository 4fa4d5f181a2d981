"""Time of each part of the decoding loop, measured in laps between them without changing the loop."""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_shortcut.contracts import (
    Acceleration,
    Clock,
    Conditions,
    Context,
    FeatureFn,
    FeatureModel,
    MaskedImageModel,
    State,
)
from lit_shortcut.metrics.latency import synchronize

_OUTSIDE = ("head", "token choice", "rest")


class Laps:
    """Seconds and calls by part. Each lap counts for the part that ran since the previous lap.

    Each lap synchronises the device, so that work counts for the part that launched it. On a GPU, where the loop
    normally runs ahead of the device, the parts add up to slightly more than the latency of the loop.

    Args:
        device: device the parts run on.
        clock: returns the time in seconds.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        self.device, self.clock = device, clock
        self.seconds: dict[str, float] = {}
        self.calls: Counter[str] = Counter()
        self.begin()

    def begin(self) -> None:
        """Begin the next lap now; time since the last one is discarded."""
        synchronize(self.device)
        self.last = self.clock()

    def end(self, part: str, calls: int = 0) -> None:
        """Count the time since the last lap, and ``calls``, for ``part``."""
        synchronize(self.device)
        now = self.clock()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self.last
        self.calls[part] += calls
        self.last = now


class TimedBase:
    """Time a base's passes as ``base``, its head's as ``head``, and everything before them as ``rest``.

    Args:
        base: the base, with which all weights are shared.
        laps: counts the time.
    """

    def __init__(self, base: MaskedImageModel, laps: Laps) -> None:
        self.base, self.laps, self.spec = base, laps, base.spec
        self.interface = copy.copy(base.interface)
        self.interface.logits = self._logits  # type: ignore[method-assign]
        self.interface.row_logits = self._row_logits  # type: ignore[method-assign]

    @property
    def fingerprint(self) -> str:
        """Return the base's fingerprint."""
        return self.base.fingerprint

    def identity(self) -> dict[str, Any]:
        """Return the base's identity."""
        return self.base.identity()

    def context(self, conditions: Conditions, *, guided: bool) -> Context:
        """Compute the base's context."""
        return self.base.context(conditions, guided=guided)

    def features(self, tokens: Tensor, context: Context, clock: Clock) -> Tensor:
        """Compute the base's features, timed."""
        self.laps.end("rest")
        features = self.base.features(tokens, context, clock)
        self.laps.end("base", calls=1)
        return features

    def decode(self, tokens: Tensor) -> Tensor:
        """Decode with the base's image decoder."""
        return self.base.decode(tokens)

    def _logits(self, features: Tensor, positions: Tensor | None = None) -> Tensor:
        self.laps.end("rest")
        logits = self.base.interface.logits(features, positions)
        self.laps.end("head", calls=1)
        return logits

    def _row_logits(self, rows: Tensor, positions: Tensor) -> Tensor:
        self.laps.end("rest")
        logits = self.base.interface.row_logits(rows, positions)
        self.laps.end("head", calls=1)
        return logits


class TimedAcceleration:
    """Time an acceleration: predicted steps count under its name, everything before them as ``rest``.

    Args:
        acceleration: the acceleration to run.
        laps: counts the time.
    """

    def __init__(self, acceleration: Acceleration, laps: Laps) -> None:
        self.acceleration, self.laps = acceleration, laps
        self.name = str(acceleration.identity()["method"])

    def identity(self) -> dict[str, Any]:
        """Return the acceleration's identity."""
        return self.acceleration.identity()

    def start(self, base: FeatureModel, context: Context, counts: Sequence[int]) -> FeatureFn:
        """Return the acceleration's feature function, timed."""
        feature_fn = self.acceleration.start(base, context, counts)
        self.laps.end("rest")

        def timed(state: State) -> tuple[Tensor, bool | Tensor]:
            self.laps.end("rest")
            features, is_full = feature_fn(state)
            is_all_full = bool(torch.as_tensor(is_full).all())
            self.laps.end("rest" if is_all_full else self.name, calls=not is_all_full)
            return features, is_full

        return timed


class Part(NamedTuple):
    """A part of the loop: its calls, and medians over rounds of its milliseconds and its share in a run."""

    name: str
    calls: int
    ms: float
    share: float

    @property
    def call_ms(self) -> float:
        """Return the milliseconds of a call."""
        return self.ms / self.calls


def parts_of(rounds: list[Laps]) -> list[Part]:
    """Return the parts of equal ``rounds``, the longest first, ``rest`` last.

    Shares are computed within each round, so that a drift of the machine's speed does not affect them.
    """
    names = [name for name in rounds[0].seconds if name != "rest"]
    parts = [_part(name, rounds) for name in names]
    return [*sorted(parts, key=lambda part: -part.ms), _part("rest", rounds)]


def summary(parts: list[Part]) -> str:
    """Say what share of a run the base takes and what share no network, and what a predictor's step costs.

    With b base passes of t in a run of T, the base's share is b·t / T.
    """
    base, *_ = (part for part in parts if part.name == "base")
    outside = sum(part.share for part in parts if part.name in _OUTSIDE)
    said = [f"base {base.share:.1%}", f"outside the networks (head, token choice, rest) {outside:.2%}"]
    for part in parts:
        if part.calls and part.name not in ("base", *_OUTSIDE):
            said.append(f"a step of {part.name} takes {part.call_ms / base.call_ms:.1%} of a base pass")
    return "; ".join(said)


def _part(name: str, rounds: list[Laps]) -> Part:
    seconds = torch.tensor([laps.seconds[name] for laps in rounds], dtype=torch.float64)
    totals = torch.tensor([sum(laps.seconds.values()) for laps in rounds], dtype=torch.float64)
    ms, share = 1000 * seconds.quantile(0.5), (seconds / totals).quantile(0.5)
    return Part(name, rounds[0].calls[name], float(ms), float(share))
