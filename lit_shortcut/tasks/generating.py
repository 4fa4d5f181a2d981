"""Draw pictures with a frozen base, accelerated or not: ``predict`` and ``generate``."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Any

import lightning as L
from torch import nn

from lit_shortcut.acceleration.accelerated import Predictor
from lit_shortcut.acceleration.compilation import Mode, compile_networks
from lit_shortcut.acceleration.shortcut import Shortcut
from lit_shortcut.contracts import Conditions, MaskedImageModel
from lit_shortcut.evaluation.drawing import require_feasible
from lit_shortcut.evaluation.rows import Row
from lit_shortcut.pictures import Drawing, PlanName, draw, row_of, settings_of
from lit_shortcut.sampling import Decoding, sample


class GenerateTask(L.LightningModule):
    """Pictures of a frozen base; nothing is trained.

    Args:
        base: the frozen model.
        decoding: how tokens are drawn.
        shortcut: computes the features of the steps that the base skips; None allows only vanilla.
        plan: which steps the base computes.
        budget: b, the number of those steps; None is all steps, vanilla.
        compare: also draw each picture with vanilla.
        compiled: run base and shortcut through ``torch.compile``.
        compile_mode: ``reduce-overhead`` replays CUDA graphs.
    """

    def __init__(
        self,
        base: MaskedImageModel,
        *,
        decoding: Decoding | None = None,
        shortcut: Predictor | None = None,
        plan: PlanName = "even",
        budget: int | None = None,
        compare: bool = False,
        compiled: bool = False,
        compile_mode: Mode = "default",
    ) -> None:
        super().__init__()
        assert isinstance(base, nn.Module)
        self.base: MaskedImageModel = base
        self.decoding, self.shortcut = decoding or Decoding(), shortcut
        self.plan: PlanName = plan
        self.budget, self.compare = budget, compare
        self.compiled, self.compile_mode = compiled, compile_mode
        self.on_step: Callable[[], None] | None = None
        if isinstance(shortcut, Shortcut):
            shortcut.require_fit(base)  # before the number of steps: another base is the better explanation
        row_of(shortcut, plan, budget, self.decoding)  # a budget outside 1..N is refused here

    @property
    def rows(self) -> list[Row]:
        """The ways to draw, vanilla first where it is compared with.

        Raises:
            ValueError: if the budget lies outside 1..N.
            WeightsError: if the shortcut is for another N.
        """
        chosen = row_of(self.shortcut, self.plan, self.budget, self.decoding)
        beside = row_of(None, self.plan, None, self.decoding)
        return [beside, chosen] if self.compare and chosen.name != beside.name else [chosen]

    @property
    def steps_per_batch(self) -> int:
        """Steps of the decoding loop for each batch, all ways together."""
        return self.decoding.num_steps * len(self.rows)

    def settings(self) -> dict[str, dict[str, Any]]:
        """Return the settings that determine pictures, by row; see :func:`~lit_shortcut.pictures.settings_of`."""
        return {row.name: settings_of(self.base, row) for row in self.rows}

    def setup(self, stage: str) -> None:
        """Check up front that everything can be drawn.

        Raises:
            ValueError: if the base does not know a condition, the schedule cannot spend the tokens in so many steps, or
                the budget lies outside 1..N.
            WeightsError: if the shortcut is for another base or N.
        """
        if (data := getattr(self.trainer, "datamodule", None)) is not None and len(data.loader()):
            require_feasible(self.base, self.rows, data)

    def on_predict_start(self) -> None:
        """Compile networks if ``compiled``, and build the rows, once for all batches."""
        self._drawn = self.rows
        if self.compiled:
            methods: list[nn.Module] = [self.shortcut] if isinstance(self.shortcut, nn.Module) else []
            compile_networks(self.base, methods, self.compile_mode)

    def predict_step(self, batch: Conditions, batch_idx: int) -> dict[str, Drawing]:
        """Return the pictures of one batch by row; the first batch is preceded by two steps of each to warm up."""
        if batch_idx == 0:
            for row in self._drawn:
                for _ in islice(sample(self.base, batch, row.decoding, row.acceleration), 2):
                    pass
        return {row.name: draw(self.base, batch, row, on_step=self._stepped) for row in self._drawn}

    def _stepped(self, step: object) -> None:
        if self.on_step is not None:
            self.on_step()
