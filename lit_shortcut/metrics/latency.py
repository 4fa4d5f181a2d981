"""Latency of runs side by side: synchronised, warmed up, per image."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch


class Latency(NamedTuple):
    """Milliseconds per image: median over ``rounds`` and distance between the 25 % and 75 % quantiles.

    ``batch_size`` images are made by each call, on ``device``, named as people name it.
    """

    median_ms: float
    iqr_ms: float
    rounds: int
    batch_size: int
    device: str


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
    """Latency of each of ``runs``, which make ``batch_size`` images on ``device`` when called.

    Each round calls every run once, in an order rotated from round to round, so that a machine that slows down or
    speeds up does so for all alike.

    Args:
        runs: what to time, by name.
        device: waited for before and after each call.
        batch_size: images per call.
        rounds: timed calls of each run.
        warmup: calls of each run before the first timed one.
        after_round: called with the number of finished rounds.
        clock: seconds that pass.

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


def speedups(latencies: dict[str, Latency], reference: str) -> dict[str, float]:
    """How many times faster than the run named ``reference`` each is, by the ratio of medians.

    >>> slow, fast = (Latency(ms, 0.0, rounds=3, batch_size=8, device="CPU") for ms in (6.0, 1.5))
    >>> speedups({"vanilla": slow, "shortcut": fast}, reference="vanilla")
    {'vanilla': 1.0, 'shortcut': 4.0}

    Raises:
        ValueError: if no run has that name.
    """
    if reference not in latencies:
        raise ValueError(f"no run is named {reference!r}; there are {', '.join(latencies)}")
    return {name: latencies[reference].median_ms / latency.median_ms for name, latency in latencies.items()}


def device_name(device: torch.device) -> str:
    """Name of ``device`` for a table: the model of the GPU, or that of the CPU with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"{_cpu_model()}, {torch.get_num_threads()} threads"
    return f"{device.type} ({platform.processor() or platform.machine()})"


def synchronize(device: torch.device) -> None:
    """Wait until ``device`` has done what it was asked for."""
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
    return Latency(median, high - low, len(times), batch_size, device)


def _cpu_model() -> str:
    """Linux tells the model in a file alone; elsewhere Python knows it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
