"""What runs of a base at published size will cost, told without its weights and without running it whole."""

from __future__ import annotations

import copy
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import pandas as pd
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lit_shortcut.acceleration.accelerated import Accelerated, Predictor
from lit_shortcut.acceleration.plans import Even
from lit_shortcut.contracts import Acceleration, Conditions, MaskedImageModel
from lit_shortcut.decoding.schedules import tokens_per_step
from lit_shortcut.metrics.cost import Depth, StepCosts, masked_places, num_bytes, num_parameters, step_costs
from lit_shortcut.metrics.latency import device_name
from lit_shortcut.metrics.memory import LiveMemory
from lit_shortcut.metrics.parts import Laps, TimedAcceleration, TimedBase, timed_layers
from lit_shortcut.sampling import Decoding, sample

_TIMED_STEPS = 2  # one full, one predicted


class PlanTask(L.LightningModule):
    """Expected time, operations and memory of runs at published size; ``test`` prints them and writes a JSON file.

    Time is extrapolated: the first two steps of a run, one full and one predicted, are timed on the task's device with
    a base of few layers, and a layer's time is taken for each of the published ones. Operations and memory are counted
    on the meta device in a whole run at published depth. Both go through the one decoding loop; no image is drawn.

    Args:
        base: with random weights, of published size in all but depth.
        published: the same at published depth, on the meta device.
        predictor: stands in for the base, at published size.
        budgets: b of the runs that are compared with vanilla.
        decoding: how tokens are drawn, and N.
        layers: the base's list of layers, one like the other, by its name.
        path: JSON file to write.
        rounds: timed runs.
        warmup: runs before them.
        processor_time: count the seconds that the processor worked for this process, shared among its threads, in place
            of those that passed: for a CPU that others use, too.

    Raises:
        ValueError: if ``published`` has weights or other sizes, ``layers`` names no list of them, a budget lies outside
            1..N, or N or rounds are too few.
    """

    def __init__(
        self,
        base: MaskedImageModel,
        published: MaskedImageModel,
        predictor: Predictor,
        budgets: list[int],
        *,
        decoding: Decoding | None = None,
        layers: str = "transformer.blocks",
        path: Path = Path("runs/plan.json"),
        rounds: int = 1,
        warmup: int = 1,
        processor_time: bool = False,
    ) -> None:
        super().__init__()
        self.decoding = decoding or Decoding()
        num_steps = self.decoding.num_steps
        if rounds < 1 or warmup < 0:
            raise ValueError(f"rounds must be at least 1 and warmup at least 0, got {rounds} and {warmup}")
        if num_steps < _TIMED_STEPS:
            raise ValueError(f"num_steps must be at least {_TIMED_STEPS}, got {num_steps}")
        if wrong := [budget for budget in budgets if not 1 <= budget <= num_steps]:
            raise ValueError(f"budget must lie in 1..{num_steps}, the number of steps; got {wrong[0]}")
        assert isinstance(published, nn.Module)
        if not all(parameter.is_meta for parameter in published.parameters()):
            raise ValueError("published must have no weights: make it on the device meta")
        if base.spec != published.spec:
            raise ValueError(f"base and published must differ in depth alone; got {base.spec} and {published.spec}")
        self.base, self.method, self.budgets = base, Accelerated(Even(1), predictor), budgets
        self.in_published_size: tuple[Any] = (published,)  # no submodule: Lightning would move it to a device
        self.layers, self.path, self.rounds, self.warmup = layers, path, rounds, warmup
        self.processor_time = processor_time
        self.clock: Callable[[], float] = _processor_time if processor_time else time.perf_counter
        built, whole = (len(self._layers_of(one)) for one in (base, published))
        self.built, self.whole = Depth(built, whole), Depth(whole, whole)

    def on_test_start(self) -> None:
        """Refuse a clock that does not see the device's work.

        Raises:
            ValueError: if processor time is asked for where the device is no CPU.
        """
        if self.processor_time and self.device.type != "cpu":
            raise ValueError(f"processor_time tells nothing of work on {self.device.type}: leave it out there")

    def test_step(self, batch: Conditions, batch_idx: int) -> None:
        """Plan for the first batch; the others are left alone."""
        if batch_idx > 0:
            return
        counts = tokens_per_step(self.decoding.schedule, self.decoding.num_steps, self.base.spec.num_tokens)
        places = masked_places(counts) if self.decoding.order == "confidence" else counts
        operations, memory = self._counted(batch, places)
        rounds = [self._timed(batch, places) for _ in range(self.warmup + self.rounds)][self.warmup :]
        seconds = StepCosts(*(statistics.median(costs) for costs in zip(*rounds, strict=True)))
        plan = {
            "facts": self.facts(batch),
            "seconds_a_step": seconds._asdict(),
            "operations_a_step": operations._asdict(),
            "memory_bytes": memory,
            "runs": self._runs(seconds, operations, len(batch.ids)),
        }
        if self.trainer.is_global_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(plan, indent=1) + "\n")
        rank_zero_info(f"\n{described(plan)}\nwritten to {self.path}")

    def facts(self, batch: Conditions) -> dict[str, Any]:
        """What the figures depend on."""
        (published,) = self.in_published_size
        text = self.base.context(batch, guided=self.decoding.is_guided).prefix
        prompt = {} if text is None else {"prompt_tokens": text.lengths.flatten().tolist()}
        return {
            "weights": "random",
            "layers": self.built.published,
            "layers_timed": self.built.built,
            "base_parameters": num_parameters(published),
            "predictor_parameters": num_parameters(self.method),
            "image_tokens": self.base.spec.num_tokens,
            **prompt,
            "num_steps": self.decoding.num_steps,
            "batch": len(batch.ids),
            "rounds": self.rounds,
            "clock": "processor" if self.processor_time else "wall",
            "device": device_name(self.device),
            "device_memory_gb": round(_memory_of(self.device) / 1e9, 1),
            "dtype": str(self.base.interface.code_embedding.dtype).removeprefix("torch."),
            "torch": torch.__version__,
        }

    def _layers_of(self, base: MaskedImageModel) -> nn.ModuleList:
        assert isinstance(base, nn.Module)
        try:
            layers = base.get_submodule(self.layers)
        except AttributeError as error:
            raise ValueError(f"layers: {type(base).__name__} has no {self.layers}") from error
        if not isinstance(layers, nn.ModuleList):
            raise ValueError(f"layers: expected a list of layers at {self.layers}, found a {type(layers).__name__}")
        return layers

    def _timed(self, batch: Conditions, places: Sequence[int]) -> StepCosts:
        """Seconds, at published depth, from the first steps of a run."""
        laps = Laps(self.device, self.clock)
        self._run(self.base, batch, self.method, laps, _TIMED_STEPS)
        return step_costs(laps, self.built, places, _TIMED_STEPS)

    def _counted(self, batch: Conditions, places: Sequence[int]) -> tuple[StepCosts, dict[str, int]]:
        """Floating-point operations of matrix products, and bytes, of a whole run on the meta device."""
        (published,) = self.in_published_size
        published.to(self.base.interface.code_embedding.dtype)
        method = copy.deepcopy(self.method).to("meta")
        ids, seeds, labels = (part.to("meta") for part in batch[:3])
        conditions = Conditions(ids, seeds, labels, batch.prompts)
        num_steps = self.decoding.num_steps
        with FlopCounterMode(display=False) as counter, LiveMemory() as memory:
            laps = Laps(torch.device("cpu"), counter.get_total_flops)
            self._run(published, conditions, method, laps, num_steps)
        taken = {"base": num_bytes(published), "predictor": num_bytes(method), "activations": memory.peak}
        return step_costs(laps, self.whole, places, num_steps), taken

    def _run(self, base: MaskedImageModel, batch: Conditions, method: Acceleration, laps: Laps, num_steps: int) -> None:
        """The first ``num_steps`` of the decoding loop, by laps."""
        timed_base, timed_method = TimedBase(base, laps), TimedAcceleration(method, laps, "predicted")
        laps.begin()
        with timed_layers(self._layers_of(base), laps):
            for _ in islice(sample(timed_base, batch, self.decoding, timed_method), num_steps):
                laps.end("token choice", calls=1)

    def _runs(self, seconds: StepCosts, operations: StepCosts, batch_size: int) -> list[dict[str, Any]]:
        """Vanilla and each budget: what an image costs, and how many times less than by vanilla."""
        num_steps = self.decoding.num_steps
        name = self.method.predictor.identity()["method"]
        return [
            {
                "method": method,
                "num_steps": num_steps,
                "budget": budget,
                "seconds_an_image": seconds.run(num_steps, budget) / batch_size,
                "speedup": seconds.run(num_steps, num_steps) / seconds.run(num_steps, budget),
                "operations_an_image": operations.run(num_steps, budget) / batch_size,
                "fewer_operations": operations.run(num_steps, num_steps) / operations.run(num_steps, budget),
            }
            for method, budget in [("vanilla", num_steps), *((name, budget) for budget in self.budgets)]
        ]


def described(plan: dict[str, Any]) -> str:
    """The plan in Markdown: steps, runs, memory, and what the figures are worth."""
    facts, memory = plan["facts"], plan["memory_bytes"]
    names = {"full": "full pass", "predicted": "predicted pass", "head": "head", "choice": "token choice"}
    steps = pd.DataFrame(
        [
            [name, _rounded(plan["seconds_a_step"][part]), _rounded(plan["operations_a_step"][part] / 1e12)]
            for part, name in names.items()
        ],
        columns=["part of a step", "s a batch", "TFLOP a batch"],
    )
    runs = pd.DataFrame(
        [
            [
                run["method"],
                run["num_steps"],
                run["budget"],
                _rounded(run["seconds_an_image"]),
                f"{run['speedup']:.2f}",
                _rounded(run["operations_an_image"] / 1e12),
                f"{run['fewer_operations']:.2f}",
            ]
            for run in plan["runs"]
        ],
        columns=["method", "N", "b", "s an image", "speed-up", "TFLOP an image", "times fewer"],
    )
    taken = pd.DataFrame(
        [[name, _rounded(size / 1e9)] for name, size in (memory | {"all": sum(memory.values())}).items()],
        columns=["memory", "GB"],
    )
    tables = "\n\n".join(table.to_markdown(index=False, disable_numparse=True) for table in (steps, runs, taken))
    return (
        f"{tables}\n\n"
        f"Expected, not measured: random weights, {facts['layers_timed']} of {facts['layers']} layers timed and the "
        "others taken to be like that; operations and memory were counted without running anything. Activations are "
        "the tensors alive at once; the image decoder is left out. No image was drawn and no quality is told.\n"
        + ", ".join(f"{name} {value}" for name, value in facts.items())
    )


def _rounded(value: float) -> str:
    """In four digits, without an exponent where the number is large."""
    return f"{float(f'{value:.4g}'):g}"


def _processor_time() -> float:
    return time.process_time() / torch.get_num_threads()


def _memory_of(device: torch.device) -> int:
    """Bytes of all memory that ``device`` has."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
