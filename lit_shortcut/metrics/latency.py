"""Latency of runs compared side by side: synchronised, warmed up, per image."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch


class Latency(NamedTuple):
    """Milliseconds per image: median over ``rounds``, interquartile range, and ``round_ms``, round by round.

    Each call makes ``batch_size`` images on ``device``, a name for tables.
    """

    median_ms: float
    iqr_ms: float
    rounds: int
    batch_size: int
    device: str
    round_ms: list[float]


def ratio(times: Sequence[float], unit: Sequence[float]) -> float:
    """Return the median over rounds of ``times`` in multiples of ``unit``: a drift between rounds affects both alike.

    >>> ratio([20.0, 44.0, 21.0], [10.0, 22.0, 10.0])
    2.0
    """
    return statistics.median(time / one for time, one in zip(times, unit, strict=True))


def measure_latency(
    runs: Mapping[str, Callable[[], object]],
    device: torch.device,
    batch_size: int,
    rounds: int,
    warmup: int = 1,
    *,
    after_round: Callable[[int], object] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Latency]:
    """Measure the latency of each of ``runs``.

    Each round calls every run once, in an order rotated from round to round, so that a drift of the machine's speed
    affects all alike.

    Args:
        runs: functions to time, by name; each makes ``batch_size`` images on ``device``.
        device: synchronised before and after each call.
        batch_size: images per call.
        rounds: timed calls of each run.
        warmup: calls of each run before the first timed one.
        after_round: called with the number of finished rounds.
        clock: returns the time in seconds.

    Raises:
        ValueError: if ``rounds`` or ``batch_size`` is not positive.
    """
    if rounds < 1 or batch_size < 1:
        raise ValueError(f"rounds and batch_size must be positive, got {rounds} and {batch_size}")
    names = list(runs)
    for _ in range(warmup):
        for name in names:
            runs[name]()
    times: dict[str, list[float]] = {name: [] for name in names}
    for index in range(rounds):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(_seconds(runs[name], device, clock) * 1000 / batch_size)
        if after_round is not None:
            after_round(index + 1)
    return {name: _summary(times[name], batch_size, device_name(device)) for name in names}


def device_name(device: torch.device) -> str:
    """Return a name of ``device`` for tables: the model of the GPU, or of the CPU with its number of threads.

    It says whether ``OMP_WAIT_POLICY`` is passive: threads that sleep between operations must be woken at each, which
    costs a short shortcut step much more of its time than a base pass.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        policy = os.environ.get("OMP_WAIT_POLICY", "")
        waiting = " that wait passively" if policy.lower() == "passive" else ""
        return f"{_cpu_model()}, {torch.get_num_threads()} threads{waiting}"
    return f"{device.type} ({platform.processor() or platform.machine()})"


def synchronize(device: torch.device) -> None:
    """Wait until ``device`` has finished all queued work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _seconds(run: Callable[[], object], device: torch.device, clock: Callable[[], float]) -> float:
    synchronize(device)
    start = clock()
    run()
    synchronize(device)
    return clock() - start


def _summary(times: list[float], batch_size: int, device: str) -> Latency:
    quantiles = torch.tensor(times, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    low, median, high = quantiles.tolist()
    return Latency(median, high - low, len(times), batch_size, device, times)


def _cpu_model() -> str:
    """Return the CPU's model: on Linux from a file, elsewhere from Python."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
