"""During fit: full accelerated sampling with the current network, measured against vanilla in the same run."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial

import lightning as L
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lit_shortcut.acceleration.accelerated import Accelerated
from lit_shortcut.acceleration.plans import Even
from lit_shortcut.acceleration.shortcut import Shortcut
from lit_shortcut.contracts import Conditions, ConditionSource, MaskedImageModel
from lit_shortcut.evaluation import Row, add_images, images_of, require_feasible, strip_of, take_values
from lit_shortcut.loggers import log_picture
from lit_shortcut.metrics.images import ImageMetric
from lit_shortcut.metrics.latency import measure_latency, speedups
from lit_shortcut.networks.shortcut import ShortcutNetwork
from lit_shortcut.report import grids, pixels
from lit_shortcut.sampling import Decoding, generate
from lit_shortcut.tasks.shortcut import ShortcutTask


class AcceleratedSampling(L.Callback):
    """At the end of validation, generate at each (N, b) and log metrics, latency, speed-up and an image grid.

    With :class:`~lit_shortcut.callbacks.ema.ModuleEMA` the averaged network is sampled with, as in all of validation.
    Latency is that of the decoding loop, synchronised and warmed up, without the image decoder, per image at the batch
    size of ``conditions``; vanilla is timed in turns with the others. Logged under ``sampling/n<N>_b<b>/…`` and
    ``sampling/vanilla_n<N>/…``; batch size and device of the timing are printed, and go to the loggers as
    hyperparameters ``sampling/latency_batch_size`` and ``sampling/latency_device``.

    Args:
        base: the frozen model the trajectories come from; another one is refused.
        decoding: how tokens are drawn; its ``num_steps`` is vanilla's N, which the speed-up refers to.
        plans: pairs (N, b).
        conditions: what to generate.
        metrics: measures of images by name.
        every_n_validations: sample at every so many validations.
        latency_rounds: times each plan is timed.
        grid_images: images of each plan shown side by side.
    """

    def __init__(
        self,
        base: MaskedImageModel,
        decoding: Decoding,
        plans: list[tuple[int, int]],
        conditions: ConditionSource,
        *,
        metrics: dict[str, ImageMetric] | None = None,
        every_n_validations: int = 1,
        latency_rounds: int = 3,
        grid_images: int = 20,
    ) -> None:
        self.base, self.decoding, self.plans, self.conditions = base, decoding, plans, conditions
        self.metrics = metrics or {}
        self.every_n_validations, self.latency_rounds, self.grid_images = (
            every_n_validations,
            latency_rounds,
            grid_images,
        )
        self.validations = 0
        self.vanilla: tuple[dict[str, float], Tensor] | None = None  # the base is frozen: once suffices

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse before anything is trained a base the trajectories do not come from, and plans that cannot be run."""
        assert isinstance(pl_module, ShortcutTask)
        rows = [Row(self.decoding.num_steps), *self._rows(pl_module.network)]
        require_feasible(self.base, self.decoding, rows, self.conditions)
        recorded = trainer.datamodule.card.base_fingerprint  # type: ignore[attr-defined]
        if recorded != self.base.fingerprint:
            raise ValueError(
                f"the trajectories come from base {recorded}, but sampling would accelerate base "
                f"{self.base.fingerprint}: give both the same weights"
            )

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Sample, measure, log."""
        assert isinstance(pl_module, ShortcutTask)
        if trainer.sanity_checking:
            return
        self.validations += 1
        if (self.validations - 1) % self.every_n_validations:
            return
        assert isinstance(self.base, nn.Module)
        self.base.to(pl_module.device)
        for metric in self.metrics.values():
            metric.to(pl_module.device)
        self._sample(trainer, pl_module)

    def _rows(self, network: ShortcutNetwork) -> list[Row]:
        shortcut = Shortcut(network)
        return [Row(num_steps, Accelerated(Even(budget), shortcut)) for num_steps, budget in self.plans]

    def _sample(self, trainer: L.Trainer, pl_module: ShortcutTask) -> None:
        device, vanilla, network = pl_module.device, Row(self.decoding.num_steps), pl_module.network
        dtype = self.base.interface.code_embedding.dtype
        if dtype != torch.float32:  # as it will run beside this base; training goes on in float32
            network = deepcopy(network).to(dtype)
        mine = [
            move_data_to_device(batch, device)
            for k, batch in enumerate(self.conditions.loader())
            if k % trainer.world_size == trainer.global_rank
        ]
        if not mine:
            raise ValueError(f"conditions hold fewer batches than there are ranks ({trainer.world_size})")
        if self.vanilla is None:
            self.vanilla = self._measure(vanilla, mine)
        measured = {f"vanilla_n{vanilla.num_steps}": self.vanilla}
        runs: dict[str, Callable[[], object]] = {}
        for row in [vanilla, *self._rows(network)]:
            facts = row.facts()
            name = row.name if facts["method"] == "vanilla" else f"n{row.num_steps}_b{facts['budget']}"
            if name not in measured:
                measured[name] = self._measure(row, mine)
            runs[name] = partial(generate, self.base, mine[0], row.decoding(self.decoding), row.method)
        latencies = measure_latency(runs, device, len(mine[0].ids), self.latency_rounds)
        ratios = speedups(latencies, f"vanilla_n{vanilla.num_steps}")
        timed = latencies[f"vanilla_n{vanilla.num_steps}"]
        facts_of_timing = {"latency_batch_size": timed.batch_size, "latency_device": timed.device}
        for logger in trainer.loggers:
            logger.log_hyperparams({f"sampling/{name}": value for name, value in facts_of_timing.items()})
        for name, (values, _) in measured.items():
            logged = values | {"latency_ms": latencies[name].median_ms, "speedup": ratios[name]}
            pl_module.log_dict({f"sampling/{name}/{metric}": v for metric, v in logged.items()}, sync_dist=True)
            shown = ", ".join(f"{metric} {value:.4g}" for metric, value in logged.items())
            rank_zero_info(
                f"step {trainer.global_step}, {name}: {shown} (timed at batch {timed.batch_size}, {timed.device})"
            )
        if trainer.is_global_zero:
            strips = {name: strip_of(images) for name, (_, images) in measured.items()}
            captions = mine[0].prompts[: self.grid_images]
            log_picture(trainer, "sampling/grid", pixels(grids(strips, captions)))

    def _measure(self, row: Row, batches: list[Conditions]) -> tuple[dict[str, float], Tensor]:
        """Values of the metrics over ``batches``, and the first images."""
        first: list[Tensor] = []
        for conditions in batches:
            images = images_of(self.base, conditions, self.decoding, row)
            add_images(self.metrics.values(), images, conditions)
            first = first or [images[: self.grid_images].cpu()]
        return take_values(self.metrics), first[0]
