"""Where the time of the decoding loop goes: laps between its parts, the loop itself untouched."""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_shortcut.contracts import Acceleration, Clock, Conditions, Context, FeatureFn, MaskedImageModel, State
from lit_shortcut.metrics.latency import synchronize


class Laps:
    """Seconds and calls by part. Each lap belongs to the part that has been running since the one before.

    The device is waited for at each lap, so that its work is booked where it was asked for. On an accelerator, where
    the loop would run ahead of the device, the parts add up to a little more than the latency of the loop.

    Args:
        device: that the parts run on.
        clock: seconds that pass.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        self.device, self.clock = device, clock
        self.seconds: dict[str, float] = {}
        self.calls: Counter[str] = Counter()
        self.begin()

    def begin(self) -> None:
        """Begin the next lap now; the time since the last one is nobody's."""
        synchronize(self.device)
        self.last = self.clock()

    def end(self, part: str, calls: int = 0) -> None:
        """Book the time since the last lap, and ``calls``, under ``part``."""
        synchronize(self.device)
        now = self.clock()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self.last
        self.calls[part] += calls
        self.last = now


class TimedBase:
    """``base`` that books its passes under ``base`` and its head's under ``head``, and what came before under ``rest``.

    Args:
        base: shares all its weights.
        laps: where time is booked.
    """

    def __init__(self, base: MaskedImageModel, laps: Laps) -> None:
        self.base, self.laps, self.spec = base, laps, base.spec
        self.interface = copy.copy(base.interface)
        self.interface.logits = self._logits  # type: ignore[method-assign]
        self.interface.row_logits = self._row_logits  # type: ignore[method-assign]

    @property
    def fingerprint(self) -> str:
        """The base's own."""
        return self.base.fingerprint

    def identity(self) -> dict[str, Any]:
        """The base's own."""
        return self.base.identity()

    def context(self, conditions: Conditions, *, guided: bool) -> Context:
        """The base's own."""
        return self.base.context(conditions, guided=guided)

    def features(self, tokens: Tensor, context: Context, clock: Clock) -> Tensor:
        """The base's own, timed."""
        self.laps.end("rest")
        features = self.base.features(tokens, context, clock)
        self.laps.end("base", calls=1)
        return features

    def decode(self, tokens: Tensor) -> Tensor:
        """The base's own."""
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
    """``acceleration`` that books the steps it spares the base under its own name, what came before under ``rest``.

    Args:
        acceleration: is what runs.
        laps: where time is booked.
    """

    def __init__(self, acceleration: Acceleration, laps: Laps) -> None:
        self.acceleration, self.laps = acceleration, laps
        self.name = str(acceleration.identity()["method"])

    def identity(self) -> dict[str, Any]:
        """The acceleration's own."""
        return self.acceleration.identity()

    def start(self, base: MaskedImageModel, context: Context, counts: Sequence[int]) -> FeatureFn:
        """The acceleration's own, timed."""
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
    """A part of the loop: medians over rounds of its milliseconds in one run and of its share of that run."""

    name: str
    calls: int
    ms: float
    share: float


def parts_of(rounds: list[Laps]) -> list[Part]:
    """The parts that equal ``rounds`` are made of, the longest first, ``rest`` last.

    A share is taken within its round, so that a machine whose speed drifts from round to round does not move it.
    """
    names = [name for name in rounds[0].seconds if name != "rest"]
    parts = [_part(name, rounds) for name in names]
    return [*sorted(parts, key=lambda part: -part.ms), _part("rest", rounds)]


def _part(name: str, rounds: list[Laps]) -> Part:
    seconds = torch.tensor([laps.seconds[name] for laps in rounds], dtype=torch.float64)
    totals = torch.tensor([sum(laps.seconds.values()) for laps in rounds], dtype=torch.float64)
    ms, share = 1000 * seconds.quantile(0.5), (seconds / totals).quantile(0.5)
    return Part(name, rounds[0].calls[name], float(ms), float(share))
