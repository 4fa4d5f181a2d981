"""Draw pictures with a frozen base, accelerated or not: ``predict`` and ``generate``."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Any

import lightning as L
from torch import nn

from lit_shortcut.acceleration.accelerated import Predictor
from lit_shortcut.acceleration.compilation import compile_networks
from lit_shortcut.contracts import Acceleration, Conditions, MaskedImageModel
from lit_shortcut.decoding.schedules import tokens_per_step
from lit_shortcut.pictures import Drawing, PlanName, acceleration_of, draw, name_of, settings_of
from lit_shortcut.sampling import Decoding, sample


class GenerateTask(L.LightningModule):
    """Pictures of a frozen base; nothing is trained.

    Args:
        base: the frozen model.
        decoding: how tokens are drawn.
        shortcut: computes the features of the steps that the base leaves out; None is vanilla only.
        plan: which steps the base computes.
        budget: b, at how many; None is all of them, vanilla.
        compare: draw each picture by vanilla, too.
        compiled: run base and shortcut through ``torch.compile``.
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
    ) -> None:
        super().__init__()
        assert isinstance(base, nn.Module)
        self.base: MaskedImageModel = base
        self.decoding, self.shortcut = decoding or Decoding(), shortcut
        self.plan: PlanName = plan
        self.budget, self.compare, self.compiled = budget, compare, compiled
        self.on_step: Callable[[], None] | None = None

    @property
    def methods(self) -> dict[str, Acceleration]:
        """The ways to draw, by name: vanilla first where it is compared with.

        Raises:
            ValueError: if the budget lies outside 1..N, or the shortcut is for another N.
        """
        num_steps = self.decoding.num_steps
        chosen = [acceleration_of(None, self.plan, None, num_steps)] if self.compare else []
        chosen.append(acceleration_of(self.shortcut, self.plan, self.budget, num_steps))
        return {name_of(self.decoding, method): method for method in chosen}

    @property
    def steps_per_batch(self) -> int:
        """Steps of the decoding loop for each batch, all methods together."""
        return self.decoding.num_steps * len(self.methods)

    def settings(self) -> dict[str, dict[str, Any]]:
        """Return what pictures follow from, by method; see :func:`~lit_shortcut.pictures.settings_of`."""
        return {name: settings_of(self.base, self.decoding, method) for name, method in self.methods.items()}

    def setup(self, stage: str) -> None:
        """Refuse what cannot be drawn before anything is.

        Raises:
            ValueError: if the base does not know a condition, the schedule cannot spend the tokens in so many steps, or
                the budget lies outside 1..N.
            WeightsError: if the shortcut is for another base or N.
        """
        counts = tokens_per_step(self.decoding.schedule, self.decoding.num_steps, self.base.spec.num_tokens)
        methods, data = self.methods, getattr(self.trainer, "datamodule", None)
        for batch in data.loader() if data is not None else ():
            context = self.base.context(batch, guided=self.decoding.is_guided)
            for method in methods.values():
                method.start(self.base, context, counts)

    def on_predict_start(self) -> None:
        """Compile where that is asked for."""
        if self.compiled:
            compile_networks(self.base, [self.shortcut] if isinstance(self.shortcut, nn.Module) else [])

    def predict_step(self, batch: Conditions, batch_idx: int) -> dict[str, Drawing]:
        """Return the pictures of one batch by method; the first batch is preceded by two steps of each to warm up."""
        methods = self.methods
        if batch_idx == 0:
            for method in methods.values():
                for _ in islice(sample(self.base, batch, self.decoding, method), 2):
                    pass
        return {
            name: draw(self.base, batch, self.decoding, method, on_step=self._stepped)
            for name, method in methods.items()
        }

    def _stepped(self, step: object) -> None:
        if self.on_step is not None:
            self.on_step()
