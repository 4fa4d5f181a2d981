from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lit_shortcut.metrics.latency import device_name, measure_latency, ratio

CPU = torch.device("cpu")


class Machine:
    """A clock that only runs move, and a record of them."""

    def __init__(self) -> None:
        self.now, self.calls = 0.0, ""

    def clock(self) -> float:
        return self.now

    def run(self, name: str, seconds: list[float]) -> Callable[[], None]:
        durations = iter(seconds)

        def call() -> None:
            self.now += next(durations)
            self.calls += name

        return call


def test_latency_is_known_where_time_is() -> None:
    machine = Machine()
    run = machine.run("a", [100.0, 0.4, 0.1, 0.2, 0.8, 0.3])  # the first is warm-up
    latency = measure_latency({"a": run}, CPU, batch_size=10, rounds=5, clock=machine.clock)["a"]
    assert latency.median_ms == pytest.approx(30)
    assert latency.iqr_ms == pytest.approx(40 - 20)
    assert (latency.rounds, latency.batch_size, latency.device) == (5, 10, device_name(CPU))


def test_runs_are_interleaved_and_rotated() -> None:
    machine = Machine()
    runs = {name: machine.run(name, [1.0] * 6) for name in "abc"}
    measure_latency(runs, CPU, batch_size=1, rounds=4, warmup=2, clock=machine.clock)
    assert machine.calls == "abcabc" + "abc" + "bca" + "cab" + "abc"


def test_drift_of_the_machine_cancels_in_the_speedup() -> None:
    machine = Machine()
    slowing = [1.0 + 0.5 * k for k in range(8)]
    runs = {"base": machine.run("b", [2 * s for s in slowing]), "fast": machine.run("f", slowing)}
    latencies = measure_latency(runs, CPU, batch_size=4, rounds=7, clock=machine.clock)
    assert latencies["base"].median_ms == pytest.approx(2 * latencies["fast"].median_ms)
    assert ratio(latencies["base"].round_ms, latencies["fast"].round_ms) == pytest.approx(2)


@pytest.mark.parametrize(("batch_size", "rounds"), [(0, 1), (1, 0)])
def test_sizes_must_be_positive(batch_size: int, rounds: int) -> None:
    with pytest.raises(ValueError, match="positive"):
        measure_latency({"a": lambda: None}, CPU, batch_size=batch_size, rounds=rounds)


def test_accelerators_are_waited_for_before_and_after(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine()
    wait = machine.run("|", [1.0] * 2)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: wait())
    run = machine.run("a", [0.0, 2.0])
    latency = measure_latency({"a": run}, torch.device("mps"), batch_size=1, rounds=1, clock=machine.clock)["a"]
    assert machine.calls == "a" + "|a|"
    assert latency.median_ms == 3000  # the wait after belongs to the run, the wait before does not


def test_cpu_is_named_with_its_threads_and_how_they_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert device_name(CPU).endswith(f", {torch.get_num_threads()} threads")
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    assert device_name(CPU).endswith(f", {torch.get_num_threads()} threads that wait passively")
