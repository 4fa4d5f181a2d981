"""Search full steps and thresholds on the validation trajectories, and write them beside the shortcut."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info

from lit_shortcut.acceleration.accelerated import Accelerated, Predictor
from lit_shortcut.acceleration.calibrated import PlanFile, SearchedSteps
from lit_shortcut.acceleration.calibration import Segments, best_plan, cost_of, threshold_for
from lit_shortcut.acceleration.plans import Adaptive, even_steps
from lit_shortcut.acceleration.replay import replayed
from lit_shortcut.acceleration.shortcut import Shortcut
from lit_shortcut.bounds import require_at_least
from lit_shortcut.tasks.ranks import sum_over_ranks
from lit_shortcut.tasks.shortcut import ShortcutTask
from lit_shortcut.trials import is_trial, require_writable_file

_TOLERANCE = 0.25  # full steps, between the mean asked for and the nearest one found


class PlanSearch(L.Callback):
    """Write the plans that :class:`~lit_shortcut.acceleration.calibrated.Calibrated` and ``CalibratedAdaptive`` read.

    Run by ``lit-shortcut validate``. Thresholds are found by replaying the whole validation set some twenty times a
    budget.

    Args:
        path: file to write.
        budgets: numbers of full steps b, below N.
        predictor: predictor at the other steps; None takes the task's network.
        adaptive: whether adaptive plans decide for each ``sample`` or ``batch``; None searches no thresholds.
        max_gap: largest number of consecutive steps without the base in an adaptive plan.

    Raises:
        ValueError: if there is no budget.
    """

    def __init__(
        self,
        path: Path,
        budgets: list[int],
        predictor: Predictor | None = None,
        adaptive: Literal["sample", "batch"] | None = "batch",
        max_gap: int | None = None,
    ) -> None:
        if not budgets:
            raise ValueError("budgets must name at least one number of full steps")
        if max_gap is not None:
            require_at_least(1, max_gap=max_gap)
        self.path, self.budgets, self.predictor = path, budgets, predictor
        self.adaptive, self.max_gap = adaptive, max_gap
        self._segments: Segments | None = None
        self._samples = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check that the search can be run and the file can be written; one that is there is added to.

        Raises:
            ValueError: if a budget is not below the set's N, plans cannot be adaptive with this predictor, the file
                holds something else, or the precision casts the weights that plans are to name.
            OSError: if the file cannot be written.
        """
        assert isinstance(pl_module, ShortcutTask)
        num_steps = trainer.datamodule.card.num_steps  # type: ignore[attr-defined]
        if not all(1 <= budget < num_steps for budget in self.budgets):
            raise ValueError(f"budgets must lie in 1..{num_steps - 1}, below the set's steps; got {self.budgets}")
        predictor = self._of(pl_module)
        if self.adaptive is not None:
            Adaptive(1.0, self.adaptive).start([], predictor)  # refuses predictors that it cannot decide for
        precision = str(trainer.precision)
        if self.predictor is None and precision.endswith("true") and precision != "32-true":
            raise ValueError(
                f"trainer.precision: {precision} casts the weights, and plans would name the cast ones; search in "
                "32-true or bf16-mixed"
            )
        require_writable_file(trainer, "validate", self.path)
        if self.path.exists():
            PlanFile.read(self.path)

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: int
    ) -> None:
        """Add the cost of every segment on this batch."""
        assert isinstance(pl_module, ShortcutTask)
        if trainer.sanity_checking:
            return
        predictor, replay = self._of(pl_module), pl_module.replay(batch)
        if self._segments is None:
            self._segments = Segments.none(len(replay.counts), predictor.memory, pl_module.device)
        with trainer.precision_plugin.val_step_context():
            self._segments = self._segments.measured(replay, predictor)
        self._samples += len(batch.tokens)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Search over all ranks' trajectories, and write on the first rank.

        Raises:
            ValueError: if a rank has no trajectories.
        """
        assert isinstance(pl_module, ShortcutTask)
        if trainer.sanity_checking:
            return
        if self._segments is None:
            raise ValueError("there are fewer validation batches than ranks; lower data.validation_batch_size")
        samples = int(sum_over_ranks(torch.tensor(float(self._samples), device=pl_module.device)))
        costs = {nodes: sum_over_ranks(cost) / samples for nodes, cost in self._segments.costs.items()}
        segments = self._segments._replace(costs=costs)
        found = SearchedSteps(counts=pl_module.counts, trajectories=samples, steps={}, kl={})
        for budget in self.budgets:
            plan, even = best_plan(segments, budget), even_steps(segments.num_steps, budget)
            found.steps[str(budget)], found.kl[str(budget)] = plan.steps, plan.kl
            rank_zero_info(
                f"b = {budget}: {plan.steps} costs {plan.kl:.3f} nats an image, "
                f"the even plan {even} {cost_of(segments, even):.3f}"
            )
            if self.adaptive is not None and 1 < budget:
                self._add_threshold(found, budget, trainer, pl_module)
        if trainer.is_global_zero and not is_trial(trainer, "validate"):
            file = PlanFile(self._of(pl_module).identity(), pl_module.ends.fingerprint, [found])
            file.write(self.path)
        self._segments, self._samples = None, 0

    def _add_threshold(self, found: SearchedSteps, budget: int, trainer: L.Trainer, pl_module: ShortcutTask) -> None:
        arguments: dict[str, Any] = {"per": self.adaptive, "max_gap": self.max_gap, "budget": budget}

        def mean_full_steps(threshold: float) -> float:
            method = Accelerated(Adaptive(threshold, **arguments), self._of(pl_module))
            total = torch.zeros((), device=pl_module.device)
            batches: Any = trainer.val_dataloaders
            for batch in islice(batches, int(trainer.num_val_batches[0])):
                with trainer.precision_plugin.val_step_context():
                    replay = pl_module.replay(batch)
                    total = total + replayed(replay, {"": method}, with_kl=False)[""].full_steps.sum()
            return float(sum_over_ranks(total)) / found.trajectories

        threshold, mean = threshold_for(mean_full_steps, budget)
        if abs(mean - budget) > _TOLERANCE:
            rank_zero_info(f"b = {budget}: no threshold reaches it; the nearest takes {mean:.2f} full steps on average")
            return
        found.adaptive[str(budget)] = arguments | {"threshold": threshold}
        found.mean_full_steps[str(budget)] = mean
        rank_zero_info(f"b = {budget}: threshold {threshold:.4g} takes {mean:.2f} full steps on average")

    def _of(self, pl_module: ShortcutTask) -> Predictor:
        return self.predictor or Shortcut(pl_module.network)
