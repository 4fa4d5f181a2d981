"""After each validation: what every method loses along the recorded trajectories, as a table."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lit_shortcut.acceleration.accelerated import Accelerated, Predictor
from lit_shortcut.acceleration.plans import Even
from lit_shortcut.acceleration.predictors import Hold, Taylor
from lit_shortcut.acceleration.replay import replayed
from lit_shortcut.acceleration.shortcut import Shortcut
from lit_shortcut.contracts import Acceleration
from lit_shortcut.tasks.ranks import sum_over_ranks
from lit_shortcut.tasks.shortcut import ShortcutTask


class ReplayTable(L.Callback):
    """Total KL of the guided heads in nats an image, at the places each step committed, along recorded tokens.

    Every method is rolled from the recorded features of its own full steps, with the control tokens that were recorded;
    N is that of the set. Logged as ``val/kl/<method>_b<budget>`` and printed as a table.

    Args:
        budgets: of the even plan, for every predictor.
        predictors: by name, beside ``shortcut``, the network being trained; hold and Taylor by default.
        others: accelerations with plans of their own, by name.

    Raises:
        ValueError: if a name is taken.
    """

    def __init__(
        self,
        budgets: list[int],
        predictors: dict[str, Predictor] | None = None,
        others: dict[str, Accelerated] | None = None,
    ) -> None:
        if predictors is None:
            predictors = {"hold": Hold(), "taylor_1": Taylor(1), "taylor_2": Taylor(2)}
        if "shortcut" in predictors:
            raise ValueError("predictors must not be named shortcut, which is the network being trained")
        if not budgets and not others:
            raise ValueError("budgets must name at least one number of full steps where there are no others")
        self.budgets, self.predictors, self.others = budgets, predictors, others or {}
        self._sums: dict[str, Tensor] = {}  # KL, full steps, samples

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse budgets that the set's N does not allow."""
        assert isinstance(pl_module, ShortcutTask)
        num_steps = trainer.datamodule.card.num_steps  # type: ignore[attr-defined]
        if not all(1 <= budget <= num_steps for budget in self.budgets):
            raise ValueError(f"budgets must lie in 1..{num_steps}, the set's number of steps; got {self.budgets}")

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: int
    ) -> None:
        """Replay all methods over the batch."""
        assert isinstance(pl_module, ShortcutTask)
        if trainer.sanity_checking:
            return
        methods = self._methods(pl_module)
        with trainer.precision_plugin.val_step_context():
            found = replayed(pl_module.replay(batch), methods, pl_module.guidance)
        for name, (kl, full_steps) in found.items():
            added = torch.stack([kl.sum(), full_steps.sum(), torch.full_like(kl.sum(), len(kl))])
            self._sums[name] = self._sums[name] + added if name in self._sums else added

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log and print the means over all ranks' trajectories."""
        assert isinstance(pl_module, ShortcutTask)
        if trainer.sanity_checking:
            return
        names = list(self._methods(pl_module))
        nothing = torch.zeros(3, device=pl_module.device)
        sums = sum_over_ranks(torch.stack([self._sums.get(name, nothing) for name in names]))
        self._sums = {}
        kl, full_steps = (sums[:, column] / sums[:, 2] for column in range(2))
        for name, value in zip(names, kl, strict=True):
            pl_module.log(f"val/kl/{name}", value, sync_dist=True)  # equal already; Lightning warns
        lines = [
            f"{name:<28}{steps:>12.2f}{value:>14.3f}"
            for name, steps, value in zip(names, full_steps.tolist(), kl.tolist(), strict=True)
        ]
        heading = f"{'method':<28}{'full steps':>12}{'nats an image':>14}"
        rank_zero_info("\n".join([f"replayed along {int(sums[0, 2])} recorded trajectories:", heading, *lines]))

    def _methods(self, pl_module: ShortcutTask) -> dict[str, Acceleration]:
        predictors: dict[str, Predictor] = {"shortcut": Shortcut(pl_module.network), **self.predictors}
        even: dict[str, Acceleration] = {
            f"{name}_b{budget}": Accelerated(Even(budget), predictor)
            for name, predictor in predictors.items()
            for budget in self.budgets
        }
        return even | self.others
