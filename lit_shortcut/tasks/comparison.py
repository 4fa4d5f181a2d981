"""Parent of the tasks that run several ways to decode side by side."""

from __future__ import annotations

from typing import Any

import lightning as L
from torch import nn

from lit_shortcut.acceleration.accelerated import Predictor
from lit_shortcut.acceleration.compilation import Mode, compile_networks
from lit_shortcut.contracts import MaskedImageModel
from lit_shortcut.evaluation.drawing import require_feasible
from lit_shortcut.evaluation.identity import log_trained_otherwise
from lit_shortcut.evaluation.rows import NamedPlan, RowEntry, build_rows, modules_of
from lit_shortcut.sampling import Decoding


class ComparisonTask(L.LightningModule):
    """Ways to decode with one frozen base; nothing is trained.

    Args:
        base: the frozen model.
        rows: ways to decode, as :func:`~lit_shortcut.evaluation.rows.build_rows` reads them.
        decoding: how tokens are drawn.
        methods: predictors by name.
        plans: plans by name, besides ``even`` and ``early``.
        random_weights: the weights are random; only sizes matter.
        compiled: run base and predictors' networks through ``torch.compile``.
        compile_mode: ``reduce-overhead`` replays CUDA graphs, for plans that are fixed before a run.

    Raises:
        ValueError: if a row is malformed or given twice.
    """

    def __init__(
        self,
        base: MaskedImageModel,
        *,
        rows: list[RowEntry],
        decoding: Decoding | None = None,
        methods: dict[str, Predictor] | None = None,
        plans: dict[str, NamedPlan] | None = None,
        random_weights: bool = False,
        compiled: bool = False,
        compile_mode: Mode = "default",
    ) -> None:
        super().__init__()
        assert isinstance(base, nn.Module)
        self.base: MaskedImageModel = base
        self.decoding = decoding or Decoding()
        self.rows = build_rows(rows, self.decoding, methods, plans)
        self.methods = modules_of(self.rows)
        self.random_weights, self.compiled, self.compile_mode = random_weights, compiled, compile_mode

    @property
    def conditions(self) -> Any:
        """Return the datamodule, the source of conditions."""
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def setup(self, stage: str) -> None:
        """Check up front that every row can be run.

        Raises:
            ValueError: if the base does not know a condition, or a row cannot be run.
        """
        require_feasible(self.base, self.rows, self.conditions)

    def on_test_start(self) -> None:
        """Compile networks if ``compiled``, and log which rows differ from what their shortcuts were trained for."""
        if self.compiled:
            compile_networks(self.base, self.methods, self.compile_mode)
        log_trained_otherwise(self.rows)
