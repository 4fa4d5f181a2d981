from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from datamodules.prompts import Prompts
from lit_shortcut.acceleration.accelerated import Planned, Vanilla
from lit_shortcut.acceleration.predictors import Hold
from lit_shortcut.acceleration.shortcut import Shortcut
from lit_shortcut.bases.dimoo.adapter import DiMOO
from lit_shortcut.bases.dimoo.published import random_weights
from lit_shortcut.contracts import Acceleration, Conditions
from lit_shortcut.networks.llada_shortcut import LLaDAShortcutNet
from lit_shortcut.sampling import Decoding, generate
from lit_shortcut.tasks.plan import PlanTask

DECODING = Decoding(6, schedule="cosine_left", guidance=4.0)
PROMPT = "a cat"


def base(depth: int, device: str = "cpu", **sizes: Any) -> DiMOO:
    small: dict[str, Any] = {"height": 64, "width": 64, "feature_width": 16, "num_heads": 2, "mlp_width": 32}
    return random_weights(depth, device=device, dtype="float32", **(small | sizes))


def shortcut() -> Shortcut:
    return Shortcut(LLaDAShortcutNet(16, num_heads=2, mlp_width=32))


@pytest.fixture
def prompts(tmp_path: Path) -> Prompts:
    (tmp_path / "prompts.txt").write_text(PROMPT)
    return Prompts(tmp_path / "prompts.txt")


def planned(task: PlanTask, prompts: Prompts) -> dict[str, Any]:
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    trainer.test(task, datamodule=prompts, verbose=False)
    plan: dict[str, Any] = json.loads(task.path.read_text())
    return plan


def operations(of: DiMOO, acceleration: Acceleration) -> int:
    """Counted in one go, where the plan adds up parts."""
    zero = torch.zeros(1, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter:
        generate(of, Conditions(zero, zero, zero, (PROMPT,)), DECODING, acceleration)
    return counter.get_total_flops()


def test_operations_of_a_run_are_those_that_the_whole_model_takes(prompts: Prompts, tmp_path: Path) -> None:
    task = PlanTask(base(2), base(5, "meta"), shortcut(), [3, 1], decoding=DECODING, path=tmp_path / "plan.json")
    runs = planned(task, prompts)["runs"]
    assert [(run["method"], run["budget"]) for run in runs] == [("vanilla", 6), ("shortcut", 3), ("shortcut", 1)]
    vanilla, _, least = (run["operations_an_image"] for run in runs)
    whole = base(5, "meta")
    assert vanilla == pytest.approx(operations(whole, Vanilla()), rel=1e-12)
    assert least == pytest.approx(operations(whole, Planned(1, shortcut().to("meta"))), rel=1e-12)
    assert [run["fewer_operations"] for run in runs] == [vanilla / run["operations_an_image"] for run in runs]


class SlowLinears:
    """Seconds that pass: one for each linear layer that runs, wherever it is."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> float:
        return self.now

    def tick(self, module: torch.nn.Module, *_: object) -> None:
        self.now += isinstance(module, torch.nn.Linear)


def test_time_of_one_layer_tells_that_of_many(prompts: Prompts, tmp_path: Path) -> None:
    def seconds(built: int) -> dict[str, float]:
        task = PlanTask(base(built), base(4, "meta"), shortcut(), [2], decoding=DECODING, path=tmp_path / "plan.json")
        task.clock = clock = SlowLinears()
        handle = torch.nn.modules.module.register_module_forward_hook(clock.tick)
        try:
            plan = planned(task, prompts)
        finally:
            handle.remove()
        assert (plan["facts"]["layers_timed"], plan["facts"]["layers"]) == (built, 4)
        assert plan["runs"][1]["speedup"] == pytest.approx(6 * 56 / (2 * 56 + 4 * plan["seconds_a_step"]["predicted"]))
        return plan["seconds_a_step"]

    # two branches of four layers with seven linears each, and a shortcut of 2 + 2 · 7 + 3 + 1 in each branch
    assert seconds(1) == seconds(4) == {"full": 56.0, "predicted": 40.0, "head": 0.0, "choice": 0.0}


def test_runs_to_warm_up_are_not_counted(prompts: Prompts, tmp_path: Path) -> None:
    slow, clock = base(1), SlowLinears()
    durations = iter([100, 100, 200, 200, 3, 4])  # of the layer in both branches, run by run
    slow.transformer.blocks[0].register_forward_hook(lambda *_: setattr(clock, "now", clock.now + next(durations)))
    task = PlanTask(slow, base(1, "meta"), Hold(), [2], decoding=DECODING, path=tmp_path / "plan.json", warmup=2)
    task.clock = clock
    assert planned(task, prompts)["seconds_a_step"]["full"] == 7.0


def test_processor_time_is_shared_among_threads(
    prompts: Prompts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = itertools.count(step=2 * torch.get_num_threads())
    monkeypatch.setattr("lit_shortcut.tasks.plan.time.process_time", lambda: next(ticks))
    arguments: dict[str, Any] = {"decoding": DECODING, "path": tmp_path / "plan.json", "processor_time": True}
    plan = planned(PlanTask(base(1), base(1, "meta"), Hold(), [2], **arguments), prompts)
    assert plan["facts"]["clock"] == "processor"
    assert plan["seconds_a_step"]["full"] == 10.0  # five laps: before and in the layer in each branch, and what follows


def test_processor_time_of_another_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    task = PlanTask(base(1), base(1, "meta"), Hold(), [2], decoding=DECODING, processor_time=True)
    monkeypatch.setattr(PlanTask, "device", torch.device("cuda"))
    with pytest.raises(ValueError, match="processor_time tells nothing of work on cuda"):
        task.on_test_start()


def test_memory_is_that_of_the_published_model(prompts: Prompts, tmp_path: Path) -> None:
    network = LLaDAShortcutNet(16, num_heads=2, mlp_width=32)
    task = PlanTask(base(1), base(9, "meta"), Shortcut(network), [2], decoding=DECODING, path=tmp_path / "plan.json")
    memory = planned(task, prompts)["memory_bytes"]
    assert memory["base"] == 4 * sum(tensor.numel() for tensor in base(9).transformer.state_dict().values())
    assert memory["predictor"] == 4 * sum(tensor.numel() for tensor in network.state_dict().values())
    assert 4 * 2 * 16 * 8192 < memory["activations"] < 10 * 4 * 2 * 16 * 8192  # logits of both branches are the largest


def test_text_says_what_the_figures_are_worth(
    prompts: Prompts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("lit_shortcut.tasks.plan.rank_zero_info", said.append)
    planned(PlanTask(base(1), base(3, "meta"), Hold(), [2], decoding=DECODING, path=tmp_path / "plan.json"), prompts)
    (text,) = said
    for shown in (
        "Expected, not measured: random weights, 1 of 3 layers timed",
        "| hold ",
        str(tmp_path / "plan.json"),
    ):
        assert shown in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rounds": 0}, "rounds must be at least 1 and warmup at least 0, got 0 and 1"),
        ({"warmup": -1}, "rounds must be at least 1 and warmup at least 0, got 1 and -1"),
        ({"budgets": [2, 7]}, r"budget must lie in 1\.\.6, the number of steps; got 7"),
        ({"decoding": Decoding(1)}, "num_steps must be at least 2, got 1"),
        ({"layers": "transformer.layers"}, r"layers: \w+ has no transformer\.layers"),
        ({"layers": "transformer.wte"}, r"layers: expected a list of layers at transformer\.wte, found a Embedding"),
    ],
)
def test_plan_that_cannot_be_made_is_refused(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"predictor": Hold(), "budgets": [2], "decoding": DECODING}
    with pytest.raises(ValueError, match=message):
        PlanTask(base(1), base(2, "meta"), **(arguments | change))


def test_base_of_other_sizes_or_with_weights_is_refused() -> None:
    with pytest.raises(ValueError, match="published must have no weights: make it on the device meta"):
        PlanTask(base(1), base(2), Hold(), [2], decoding=DECODING)
    with pytest.raises(ValueError, match=r"differ in depth alone; got TokenSpec\(num_tokens=16.*num_tokens=32"):
        PlanTask(base(1), base(2, "meta", width=128), Hold(), [2], decoding=DECODING)
