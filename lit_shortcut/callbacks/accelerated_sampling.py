"""Accelerated sampling during fit with the current network, measured against vanilla in the same run."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import lightning as L
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lit_shortcut.acceleration.accelerated import Predictor
from lit_shortcut.acceleration.origin import Origin
from lit_shortcut.acceleration.shortcut import Shortcut
from lit_shortcut.bounds import require_at_least
from lit_shortcut.contracts import Conditions, ConditionSource, MaskedImageModel
from lit_shortcut.evaluation.drawing import Drawn, draw_row, require_feasible, strip_of
from lit_shortcut.evaluation.identity import log_trained_otherwise
from lit_shortcut.evaluation.rows import TRAINED, NamedPlan, Row, RowEntry, build_rows, require_others, vanilla_row
from lit_shortcut.evaluation.tally import Tally
from lit_shortcut.evaluation.timing import time_rows
from lit_shortcut.loggers import carry_on, log_picture
from lit_shortcut.metrics.images import ImageMetric
from lit_shortcut.metrics.latency import ratio
from lit_shortcut.metrics.paired import are_paired
from lit_shortcut.networks.shortcut import ShortcutNetwork
from lit_shortcut.precision import sampling_precision
from lit_shortcut.report.grids import grids
from lit_shortcut.report.plot import pixels
from lit_shortcut.sampling import Decoding
from lit_shortcut.tasks.shortcut import ShortcutTask
from lit_shortcut.trajectory import Card


class AcceleratedSampling(L.Callback):
    """At the end of validation, draw each row and log metrics, latency, speed-up and an image grid.

    With :class:`~lit_shortcut.callbacks.ema.ModuleEMA` the averaged network is used, as in all of validation. Images
    are drawn in the trainer's precision, as ``test`` draws them. Latency is that of the decoding loop without the image
    decoder, per image at the batch size of ``conditions``, synchronised and after a warm-up; vanilla and the other rows
    are timed in turns. Values are logged under ``sampling/<name of the row>/…``; batch size and device of the timing go
    to the loggers as hyperparameters ``sampling/latency_batch_size`` and ``sampling/latency_device``.

    Args:
        base: the frozen model the trajectories come from; another one is refused.
        decoding: how tokens are drawn; its ``num_steps`` is vanilla's N, which the speed-up refers to.
        rows: ways to decode, as :func:`~lit_shortcut.evaluation.rows.build_rows` reads them. The method ``shortcut`` is
            the network being trained; vanilla is always drawn as well.
        conditions: what to generate.
        methods: other predictors by name.
        plans: plans by name, besides ``even`` and ``early``.
        metrics: measures of images by name.
        every_n_validations: sample at every n-th validation.
        latency_rounds: how often each row is timed; 0 leaves latency out.
        grid_images: images of each row shown side by side; 0 leaves the grid out.

    Raises:
        ValueError: if a method has the name of the network being trained, or a number is too small.
    """

    def __init__(
        self,
        base: MaskedImageModel,
        decoding: Decoding,
        rows: list[RowEntry],
        conditions: ConditionSource,
        *,
        methods: dict[str, Predictor] | None = None,
        plans: dict[str, NamedPlan] | None = None,
        metrics: dict[str, ImageMetric] | None = None,
        every_n_validations: int = 1,
        latency_rounds: int = 3,
        grid_images: int = 20,
    ) -> None:
        require_at_least(1, every_n_validations=every_n_validations)
        require_at_least(0, latency_rounds=latency_rounds, grid_images=grid_images)
        self.base, self.decoding, self.rows, self.conditions = base, decoding, rows, conditions
        self.methods, self.plans, self.metrics = methods or {}, plans, metrics or {}
        require_others(self.methods)
        self.every_n_validations, self.latency_rounds = every_n_validations, latency_rounds
        self.grid_images = grid_images
        self.validations = 0
        self.vanilla: tuple[dict[str, float], Tensor] | None = None  # the base is frozen: once suffices
        self.originals: list[Drawn] = []  # vanilla's images, batch by batch, if a metric compares with them
        self.copy: ShortcutNetwork | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the number of validations so far."""
        return {"validations": self.validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the number of validations."""
        self.validations = state_dict["validations"]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check, before training, that this base recorded the trajectories and that all rows can be run on each rank.

        Rows that are not drawn as the trajectories were, in another number of steps say, are logged.

        Raises:
            ValueError: if it is another base, a row cannot be run, or there are fewer batches of conditions than ranks.
        """
        assert isinstance(pl_module, ShortcutTask)
        if (num_batches := len(self.conditions.loader())) < trainer.world_size:
            raise ValueError(
                f"conditions of AcceleratedSampling make {num_batches} batch{'es' * (num_batches > 1)}, and each of "
                f"{trainer.world_size} ranks needs one: lower their batch_size or raise num_images"
            )
        card: Card = trainer.datamodule.card  # type: ignore[attr-defined]
        rows = self._rows(pl_module.network, Origin(decoding=card.decoding))
        require_feasible(self.base, rows, self.conditions)
        if card.base_fingerprint != self.base.fingerprint:
            raise ValueError(
                f"the trajectories come from base {card.base_fingerprint}, but sampling would accelerate base "
                f"{self.base.fingerprint}: use the same weights for both"
            )
        log_trained_otherwise(rows)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Sample, measure, log."""
        assert isinstance(pl_module, ShortcutTask)
        if trainer.sanity_checking:
            return
        self.validations += 1
        if (self.validations - 1) % self.every_n_validations:
            return
        assert isinstance(self.base, nn.Module)
        precision = sampling_precision(trainer)
        precision.convert_module(self.base).to(pl_module.device)
        with precision.forward_context():
            self._sample(trainer, pl_module)

    def _rows(self, network: ShortcutNetwork, origin: Origin | None = None) -> list[Row]:
        """Return vanilla, then all other rows, those with ``network`` of that ``origin``."""
        methods = self.methods | {TRAINED: Shortcut(network, origin=origin)}
        rows = build_rows(self.rows, self.decoding, methods, self.plans)
        vanilla = vanilla_row(self.decoding)
        return [vanilla, *(row for row in rows if row.name != vanilla.name)]

    def _network(self, task: ShortcutTask) -> ShortcutNetwork:
        """Return the network in the precision of the base, as it will run; training keeps its own."""
        dtype = self.base.interface.code_embedding.dtype
        if dtype == next(task.network.parameters()).dtype:
            return task.network
        if self.copy is None:
            self.copy = deepcopy(task.network).to(dtype).requires_grad_(False)
            if task.network._compiled_call_impl is not None:  # a copy is not compiled
                self.copy.compile(fullgraph=True)
        self.copy.load_state_dict(task.network.state_dict())
        return self.copy.train(task.network.training)

    def _sample(self, trainer: L.Trainer, pl_module: ShortcutTask) -> None:
        rows = self._rows(self._network(pl_module))
        mine = [
            move_data_to_device(batch, pl_module.device)
            for k, batch in enumerate(self.conditions.loader())
            if k % trainer.world_size == trainer.global_rank
        ]
        vanilla, *others = rows
        if self.vanilla is None:
            self.vanilla = self._measure(vanilla, mine)
        measured = {vanilla.name: self.vanilla} | {row.name: self._measure(row, mine) for row in others}
        # batches of other ranks may be smaller
        latencies = trainer.strategy.broadcast(self._latencies(trainer, rows, mine[0]))
        for name, (values, _) in measured.items():
            logged = values | latencies.get(name, {})
            pl_module.log_dict({f"sampling/{name}/{metric}": v for metric, v in logged.items()}, sync_dist=True)
            shown = ", ".join(f"{metric} {value:.4g}" for metric, value in logged.items())
            rank_zero_info(f"step {trainer.global_step}, {name}: {shown}")
        if trainer.is_global_zero and self.grid_images:
            with carry_on("drawing the grid"):
                strips = {name: strip_of(images) for name, (_, images) in measured.items()}
                log_picture(trainer, "sampling/grid", pixels(grids(strips, mine[0].prompts[: self.grid_images])))

    def _latencies(self, trainer: L.Trainer, rows: list[Row], conditions: Conditions) -> dict[str, dict[str, float]]:
        """Return latency and speed-up by row name."""
        if not self.latency_rounds:
            return {}
        timed = time_rows(self.base, rows, self.decoding, conditions, self.latency_rounds)
        vanilla = timed[rows[0].name]
        for logger in trainer.loggers:
            about = {f"sampling/latency_{name}": vanilla[name] for name in ("batch_size", "device")}
            logger.log_hyperparams(about)
        rank_zero_info(f"timed at batch {vanilla['batch_size']}, {vanilla['device']}")
        return {
            name: {"latency_ms": own["median_ms"], "speedup": ratio(vanilla["round_ms"], own["round_ms"])}
            for name, own in timed.items()
        }

    def _measure(self, row: Row, batches: list[Conditions]) -> tuple[dict[str, float], Tensor]:
        """Return values of the metrics and base passes over ``batches``, and the first images."""
        device = batches[0].seeds.device
        tally = Tally(self.metrics, row.decoding.num_steps, device)
        first: list[Tensor] = []
        is_paired = are_paired(self.metrics)
        for index, conditions in enumerate(batches):
            drawn = draw_row(self.base, conditions, row)
            if is_paired and self.vanilla is None:
                self.originals.append(move_data_to_device(drawn, "cpu"))
            tally.add(drawn, conditions, move_data_to_device(self.originals[index], device) if is_paired else None)
            first = first or [drawn.images[: self.grid_images].cpu()]
        values, full_steps = tally.compute()
        return values | {"full_steps": full_steps["mean"]}, first[0]
