"""Table, after each validation, of what every method loses along the recorded trajectories."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lit_shortcut.acceleration.accelerated import Predictor
from lit_shortcut.acceleration.predictors import Hold, Taylor
from lit_shortcut.acceleration.replay import replayed
from lit_shortcut.acceleration.shortcut import Shortcut
from lit_shortcut.contracts import Context
from lit_shortcut.evaluation.rows import TRAINED, NamedPlan, Row, RowEntry, build_rows, naming, require_others
from lit_shortcut.sampling import Decoding
from lit_shortcut.tasks.ranks import sum_over_ranks
from lit_shortcut.tasks.shortcut import ShortcutTask
from lit_shortcut.trajectory import Card


class ReplayTable(L.Callback):
    """Total KL of the guided heads in nats an image, at the places each step committed, along recorded tokens.

    Every method starts from the recorded features of its own full steps and sees the recorded control tokens; N and
    decoding are those of the set. Logged as ``val/kl/<row>`` and printed as a table.

    Args:
        budgets: b of the even plan, for every method.
        methods: predictors by name, besides ``shortcut``, the network being trained; hold and Taylor by default.
        rows: further rows, as :func:`~lit_shortcut.evaluation.rows.build_rows` reads them, with the set's N.
        plans: plans by name, besides ``even`` and ``early``.

    Raises:
        ValueError: if a method has the name of the network being trained, or there are neither budgets nor rows.
    """

    def __init__(
        self,
        budgets: list[int],
        methods: dict[str, Predictor] | None = None,
        rows: list[RowEntry] | None = None,
        plans: dict[str, NamedPlan] | None = None,
    ) -> None:
        if methods is None:
            methods = {"hold": Hold(), "taylor_1": Taylor(1), "taylor_2": Taylor(2)}
        require_others(methods)
        if not budgets and not rows:
            raise ValueError("budgets must name at least one number of full steps if there are no rows")
        self.budgets, self.methods, self.rows, self.plans = budgets, methods, rows or [], plans
        self._sums: dict[str, Tensor] = {}  # KL, full steps, samples

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse rows that cannot be replayed on the set.

        Raises:
            ValueError: if a row is malformed, or has another N or decoding than the set.
        """
        assert isinstance(pl_module, ShortcutTask)
        card: Card = trainer.datamodule.card  # type: ignore[attr-defined]
        for row in self._rows(pl_module, card.num_steps):
            if row.overrides or row.decoding.num_steps != card.num_steps:
                raise ValueError(f"row {row.name}: trajectories of {card.num_steps} steps are replayed as recorded")

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse, before anything is trained, rows that do not fit the set's base.

        Raises:
            ValueError: naming the row, if its method or plan is for another base, other steps or another predictor.
        """
        assert isinstance(pl_module, ShortcutTask)
        ends: Any = pl_module.ends
        for row in self._rows(pl_module, len(pl_module.counts)):
            with naming(row.name):
                row.acceleration.start(ends, Context(), pl_module.counts)

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: int
    ) -> None:
        """Replay all methods over the batch."""
        assert isinstance(pl_module, ShortcutTask)
        if trainer.sanity_checking:
            return
        replay = pl_module.replay(batch)
        methods = {row.name: row.acceleration for row in self._rows(pl_module, len(replay.counts))}
        with trainer.precision_plugin.val_step_context():
            found = replayed(replay, methods)
        for name, (kl, full_steps) in found.items():
            added = torch.stack([kl.sum(), full_steps.sum(), torch.full_like(kl.sum(), len(kl))])
            self._sums[name] = self._sums[name] + added if name in self._sums else added

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log and print the means over all ranks' trajectories."""
        assert isinstance(pl_module, ShortcutTask)
        if trainer.sanity_checking:
            return
        names = [row.name for row in self._rows(pl_module, len(pl_module.counts))]
        nothing = torch.zeros(3, device=pl_module.device)
        sums = sum_over_ranks(torch.stack([self._sums.get(name, nothing) for name in names]))
        self._sums = {}
        kl, full_steps = (sums[:, column] / sums[:, 2] for column in range(2))
        for name, value in zip(names, kl, strict=True):
            pl_module.log(f"val/kl/{name}", value, sync_dist=True)  # equal on all ranks; Lightning warns without
        lines = [
            f"{name:<28}{steps:>12.2f}{value:>14.3f}"
            for name, steps, value in zip(names, full_steps.tolist(), kl.tolist(), strict=True)
        ]
        heading = f"{'method':<28}{'full steps':>12}{'nats an image':>14}"
        rank_zero_info("\n".join([f"replayed along {int(sums[0, 2])} recorded trajectories:", heading, *lines]))

    def _rows(self, pl_module: ShortcutTask, num_steps: int) -> list[Row]:
        methods = {TRAINED: Shortcut(pl_module.network), **self.methods}
        even = [(num_steps, budget, name) for name in methods for budget in self.budgets]
        return build_rows([*even, *self.rows], Decoding(), methods, self.plans)
