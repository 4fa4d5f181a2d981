"""Training in batches against a loop over single pairs, as the method was published: pairs a second, same loss a pair.

``python -m lit_shortcut.bench_data.training`` prints a table and writes it to ``runs/bench_data/training.json``. Both
ways run the same network, loss and optimiser over the same pairs in turns, so the ratio does not hang on the machine's
pace.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lit_shortcut.contracts import Conditions, Control, Trajectories, Transition
from lit_shortcut.decoding.schedules import tokens_per_step
from lit_shortcut.interface import TokenInterface
from lit_shortcut.metrics.latency import measure_latency, speedups
from lit_shortcut.networks.shortcut import ShortcutNet
from lit_shortcut.tasks.shortcut import ShortcutTask
from lit_shortcut.trajectory import select

_LOOP, _BATCHES = "single pairs", "batches"
_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}  # relative, of the mean loss of a pair


@dataclass(frozen=True)
class Size:
    """A training to measure.

    Args:
        name: of the row.
        network: arguments of the :class:`ShortcutNet`.
        num_tokens: L; there is one row of features more.
        codebook_size: V.
        num_steps: N.
        kl_weight: of the head's KL in the loss.
        batch_size: pairs in a batch, and single pairs beside it.
        precision: the network runs in; weights are float32.
        rounds: of both ways in turns.
    """

    name: str
    network: dict[str, Any]
    num_tokens: int
    codebook_size: int
    num_steps: int
    kl_weight: float
    batch_size: int
    precision: str = "float32"
    rounds: int = 5


SIZES = (
    Size(  # configs/fashion/fit.yaml
        "fashion default",
        {"width": 128, "num_heads": 1, "bottleneck_ratio": 2.0, "grid": 14, "reach": 3},
        num_tokens=196,
        codebook_size=64,
        num_steps=8,
        kl_weight=1.0,
        batch_size=64,
    ),
    Size(  # configs/maskgit/fit.yaml
        "MaskGIT 512×512",
        {"width": 768, "num_heads": 16, "bottleneck_ratio": 2.0},
        num_tokens=1024,
        codebook_size=1024,
        num_steps=15,
        kl_weight=0.0,
        batch_size=8,
        precision="bfloat16",
        rounds=3,
    ),
)


def bench_training(sizes: Sequence[Size] = SIZES) -> pd.DataFrame:
    """Two rows a size: the loop over single pairs, and batches.

    Raises:
        ValueError: if the two ways differ in the loss of a pair.
    """
    return pd.DataFrame([row for size in sizes for row in _measure(size)])


def random_pairs(size: Size) -> Transition:
    """``batch_size`` pairs of random features, in the course of decoding that the schedule makes."""
    generator = torch.Generator().manual_seed(0)
    starts, length = size.num_steps - 1, size.num_tokens
    images = -(-size.batch_size // starts)
    steps = torch.arange(size.num_steps).repeat_interleave(
        torch.tensor(tokens_per_step("arccos", size.num_steps, length))
    )
    trajectories = Trajectories(
        Conditions(*torch.arange(images).expand(3, -1)),
        torch.randn(images, 1, size.num_steps, length + 1, size.network["width"], generator=generator).bfloat16(),
        torch.randint(size.codebook_size, (images, length), generator=generator),
        torch.stack([steps[torch.randperm(length, generator=generator)] for _ in range(images)]),
    )
    # spread evenly over the steps, whose loss and cost differ
    places = [(pair // starts, 0, pair * starts // size.batch_size % starts) for pair in range(size.batch_size)]
    return select(trajectories, places)


def task_of(size: Size) -> ShortcutTask:
    """The training task with random weights, also of the last projection, and a random interface."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        task = ShortcutTask(ShortcutNet(**size.network), kl_weight=size.kl_weight)
        assert isinstance(task.network.widen, nn.Linear)
        nn.init.normal_(task.network.widen.weight, std=0.05)
        table = torch.randn(size.codebook_size, size.network["width"]) / size.network["width"] ** 0.5
        positions = torch.randn(size.num_tokens, size.network["width"])
        task.interface = TokenInterface(size.num_tokens, table, table, positions)
    return task


def _measure(size: Size) -> list[dict[str, Any]]:
    task, batch = task_of(size), random_pairs(size)
    batches = {_LOOP: [_single(batch, row) for row in range(size.batch_size)], _BATCHES: [batch]}
    losses = {way: _loss_of_a_pair(task, size, several) for way, several in batches.items()}
    if abs(losses[_LOOP] - losses[_BATCHES]) > _TOLERANCE[size.precision] * losses[_LOOP]:
        raise ValueError(f"{size.name}: the loss of a pair differs: {losses}")
    runs = {way: partial(_train, _Trained(task), size, several) for way, several in batches.items()}
    latencies = measure_latency(runs, torch.device("cpu"), size.batch_size, size.rounds)
    ratios = speedups(latencies, _LOOP)
    return [
        {
            "training": size.name,
            "rows × width": f"{size.num_tokens + 1} × {size.network['width']}",
            "precision": size.precision,
            "way": way,
            "batch": len(several[0].step),
            "pairs/s": round(1000 / latencies[way].median_ms, 1),
            "ratio": round(ratios[way], 2),
            "loss a pair": round(losses[way], 5),
            "rounds": size.rounds,
            "device": latencies[way].device,
            "torch": torch.__version__,
        }
        for way, several in batches.items()
    ]


class _Trained:
    """A copy of a task with its own optimiser."""

    def __init__(self, task: ShortcutTask) -> None:
        self.task = copy.deepcopy(task)
        self.optimizer = torch.optim.AdamW(self.task.network.parameters(), lr=1e-4)


def _train(trained: _Trained, size: Size, batches: Sequence[Transition]) -> None:
    """A step of the optimiser for each of ``batches``."""
    for batch in batches:
        trained.optimizer.zero_grad()
        with _precision(size):
            terms, _ = trained.task.terms(batch, last=0)
        (terms[0] + size.kl_weight * terms[2]).backward()
        trained.optimizer.step()


@torch.no_grad()
def _loss_of_a_pair(task: ShortcutTask, size: Size, batches: Sequence[Transition]) -> float:
    """Mean loss at a masked place over all ``batches``."""
    with _precision(size):
        terms, counts = (
            torch.stack(parts) for parts in zip(*(task.terms(one, last=0) for one in batches), strict=True)
        )
    error, _, kl = (terms * counts).sum(0) / counts.sum(0)
    return float(error + size.kl_weight * kl)


def _single(batch: Transition, row: int) -> Transition:
    """The pair at ``row``, its control without padding as a loader of single pairs has it."""
    assert batch.control.is_real is not None
    tokens, positions = (part[row, 0][batch.control.is_real[row, 0]][None, None] for part in batch.control[:2])
    own = slice(row, row + 1)
    return Transition(
        batch.features[own],
        Control(tokens, positions),
        batch.masked_share[own],
        batch.targets[own],
        batch.is_masked[own],
        batch.step[own],
    )


def _precision(size: Size) -> Any:
    return torch.autocast("cpu", torch.bfloat16) if size.precision == "bfloat16" else nullcontext()


def main(path: Path = Path("runs/bench_data/training.json")) -> None:
    """Print the table and write it to ``path``."""
    table = bench_training()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table.to_dict("records"), indent=1, ensure_ascii=False) + "\n")
    shown = table.drop(columns=["rounds", "device", "torch"]).to_markdown(index=False)
    rank_zero_info(f"\n{shown}\n\n{table['device'][0]}, torch {torch.__version__}\nwritten to {path}")


if __name__ == "__main__":
    main()
