"""Training in batches against a loop over single pairs, as the method was published: pairs a second, same loss a pair.

All ways run the same network over the same pairs in turns, with all that a step of the configured training does: loss,
gradients, clipping, AdamW, average of weights. So the ratio does not depend on the machine's speed.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from benchmarks.table import Table
from lit_shortcut.acceleration.replay import RecordedEnds
from lit_shortcut.contracts import Conditions, Control, TokenSpec, Trajectories, Transition
from lit_shortcut.decoding.schedules import tokens_per_step
from lit_shortcut.interface import TokenInterface
from lit_shortcut.losses import HeadKL, Loss, MaskedMSE, weighted_sum
from lit_shortcut.metrics.latency import measure_latency
from lit_shortcut.networks.shortcut import ShortcutNet
from lit_shortcut.tasks.shortcut import ShortcutTask
from lit_shortcut.trajectory.transitions import select

_LOOP = "single pairs"
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
        gradient_clip: largest norm of the gradient; None does not clip.
        precisions: the loop runs in the first, batches in each; weights are float32.
        rounds: of all ways in turns.
    """

    name: str
    network: dict[str, Any]
    num_tokens: int
    codebook_size: int
    num_steps: int
    kl_weight: float
    batch_size: int
    gradient_clip: float | None = None
    precisions: tuple[str, ...] = ("float32",)
    rounds: int = 5


SIZES = (
    Size(  # configs/fashion/fit.yaml
        "fashion default",
        {"width": 128, "num_heads": 1, "bottleneck_ratio": 2.0, "grid": 14, "reach": 3}
        | {"num_convs": 3, "rows": "masked", "uses_states": True, "anchored": True, "guided": True},
        num_tokens=196,
        codebook_size=64,
        num_steps=16,
        kl_weight=1.0,
        batch_size=64,
        gradient_clip=1.0,
        precisions=("float32", "bfloat16"),
    ),
    Size(  # configs/maskgit/fit.yaml
        "MaskGIT 512×512",
        {"width": 768, "num_heads": 16, "bottleneck_ratio": 2.0},
        num_tokens=1024,
        codebook_size=1024,
        num_steps=15,
        kl_weight=0.0,
        batch_size=8,
        precisions=("bfloat16",),
        rounds=3,
    ),
)


def measure(sizes: Sequence[Size] = SIZES) -> Table:
    """A row for the loop over single pairs at each size, and one for batches in each precision.

    Raises:
        ValueError: if the ways differ in the loss of a pair.
    """
    rows = [row for size in sizes for row in _measure(size)]
    return Table(
        "Training: batches against single pairs",
        rows,
        "Same network, pairs and loss; a step is loss, gradients, clipping, AdamW and average. Medians of rounds in "
        "turns; ratios are of pairs a second to the loop over single pairs.",
    )


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
        losses: dict[str, Loss] = {"mse": MaskedMSE()}
        if size.kl_weight:
            losses["kl"] = HeadKL(size.kl_weight)
        task = ShortcutTask(ShortcutNet(**size.network), losses=losses)
        assert isinstance(task.network.widen, nn.Linear)
        nn.init.normal_(task.network.widen.weight, std=0.05)
        table = torch.randn(size.codebook_size, size.network["width"]) / size.network["width"] ** 0.5
        positions = torch.randn(size.num_tokens, size.network["width"])
        spec = TokenSpec(
            size.num_tokens, size.num_tokens + 1, size.network["width"], size.codebook_size, size.codebook_size, 0
        )
        task.use(RecordedEnds(spec, TokenInterface(size.num_tokens, table, table, positions), "random"))
    return task


class _Way(NamedTuple):
    """A way to train: the precision, and the batches that a round goes through."""

    name: str
    precision: str
    batches: list[Transition]


def _measure(size: Size) -> list[dict[str, Any]]:
    task, batch = task_of(size), random_pairs(size)
    ways = [_Way(_LOOP, size.precisions[0], [_single(batch, row) for row in range(size.batch_size)])]
    ways += [_Way(f"batches, {precision}", precision, [batch]) for precision in size.precisions]
    losses = [_loss_of_a_pair(task, way) for way in ways]
    for way, loss in zip(ways, losses, strict=True):
        if abs(loss - losses[0]) > _TOLERANCE[way.precision] * losses[0]:
            raise ValueError(f"{size.name}, {way.name}: the loss of a pair is {loss}, not {losses[0]}")
    runs = {way.name: partial(_train, Trained(task), size, way) for way in ways}
    latencies = measure_latency(runs, torch.device("cpu"), size.batch_size, size.rounds)
    return [
        {
            "training": size.name,
            "rows × width": f"{size.num_tokens + 1} × {size.network['width']}",
            "way": way.name,
            "precision": way.precision,
            "batch": len(way.batches[0].step),
            "pairs/s": round(1000 / latencies[way.name].median_ms, 1),
            "ratio": round(latencies[_LOOP].median_ms / latencies[way.name].median_ms, 2),
            "loss a pair": round(loss, 5),
            "rounds": size.rounds,
        }
        for way, loss in zip(ways, losses, strict=True)
    ]


class Trained:
    """A copy of a task on ``device`` with its own optimiser and average."""

    def __init__(self, task: ShortcutTask, device: torch.device | None = None) -> None:
        self.task = copy.deepcopy(task).to(device)
        self.parameters = list(self.task.network.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4)
        self.average = AveragedModel(self.task.network, multi_avg_fn=get_ema_multi_avg_fn(0.999))

    def step(self, batch: Transition, precision: torch.autocast, gradient_clip: float | None = None) -> None:
        """Loss, gradients, optimiser and average on ``batch``."""
        self.optimizer.zero_grad()
        with precision:
            terms = _terms(self.task, batch)
        weighted_sum(self.task.losses, terms).backward()
        if gradient_clip is not None:
            nn.utils.clip_grad_norm_(self.parameters, gradient_clip)
        self.optimizer.step()
        self.average.update_parameters(self.task.network)


def _train(trained: Trained, size: Size, way: _Way) -> None:
    """A step of the optimiser for each batch."""
    for batch in way.batches:
        trained.step(batch, _autocast(way), size.gradient_clip)


@torch.no_grad()
def _loss_of_a_pair(task: ShortcutTask, way: _Way) -> float:
    """Mean loss at a masked place over all batches."""
    with _autocast(way):
        losses = [weighted_sum(task.losses, _terms(task, batch)) for batch in way.batches]
    counts = torch.stack([batch.is_masked.sum() for batch in way.batches])
    return float((torch.stack(losses) * counts).sum() / counts.sum())


def _terms(task: ShortcutTask, batch: Transition) -> dict[str, Tensor]:
    return task.terms(task.predict(batch, 0), batch.targets[:, 0], task.where(batch, 0))


def _single(batch: Transition, row: int) -> Transition:
    """The pair at ``row``, its control without padding as a loader of single pairs has it."""
    assert batch.control.is_real is not None
    tokens, positions = (part[row, 0][batch.control.is_real[row, 0]][None, None] for part in batch.control[:2])
    own = slice(row, row + 1)
    return Transition(
        batch.features[own],
        Control(tokens, positions),
        batch.targets[own],
        batch.is_masked[own],
        batch.step[own],
        batch.gap[own],
        num_masked=(int(batch.is_masked[own].sum()),),
    )


def _autocast(way: _Way) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=way.precision == "bfloat16")
