"""Exponential moving average of one submodule's weights; validation and sampling during fit run with the average."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lit_shortcut.bounds import require_share


class ModuleEMA(WeightAveraging):
    """Average only ``pl_module.<module>``, with a warm-up for the benefit of short runs.

    Lightning's ``EMAWeightAveraging`` copies the whole LightningModule (frozen teachers and, through the optimiser
    factory, the command line itself), and puts the raw weights back before the hooks that sample images run. This one
    copies one submodule and swaps around the whole validation run. In a checkpoint ``state_dict`` holds the average and
    ``current_model_state`` the raw weights, as Lightning's does.

    Args:
        decay: weight of the old average per update.
        module: name of the submodule of the LightningModule.
        warmup: use min(decay, (1 + n) / (10 + n)) at update n, the schedule of TensorFlow's moving average.
    """

    def __init__(self, decay: float = 0.9999, module: str = "network", warmup: bool = True) -> None:
        require_share(decay=decay)
        super().__init__(use_buffers=False)
        self.decay, self.module, self.warmup = decay, module, warmup
        self._updates = 0  # counted here, since torch's counter is on the device
        self._raw: list[Tensor] = []  # weights put aside during validation
        self._raw_at_end: dict[str, Tensor] | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Copy the submodule; the module itself is still on the CPU here, so the device comes from the strategy."""
        if stage == "fit":
            self._raw_at_end, self._updates, self._latest_update_step = None, 0, 0
            self._average_model = AveragedModel(
                self._submodule(pl_module), device=trainer.strategy.root_device, use_buffers=False, **self._kwargs
            )

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the average in float32 at least: bfloat16 rounds small steps away."""
        assert self._average_model is not None
        for average, now in self._pairs(pl_module):
            average.data = average.data.to(torch.promote_types(now.dtype, torch.float32))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update after each optimiser step, not after each accumulated batch."""
        if self._average_model is not None and trainer.global_step > self._latest_update_step:
            self._update(pl_module)
            self._latest_update_step = trainer.global_step

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Do nothing: updates follow steps."""

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the average in the module; a checkpoint saved from now on still has the raw weights."""
        self._raw_at_end = {k: v.clone() for k, v in self._submodule(pl_module).state_dict().items()}
        super().on_train_end(trainer, pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the average in the module, too, where a finished run was resumed and there was nothing to train."""
        if self._raw_at_end is None:
            self.on_train_end(trainer, pl_module)

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """No swap here: ``on_validation_start`` has done it, before any callback's epoch hook."""

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """No swap here: other callbacks sample with the average in this hook."""

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the average in, unless nothing has been averaged yet (Lightning issue 21724)."""
        if self._has_average():
            self._raw = [parameter.detach().clone() for parameter in self._submodule(pl_module).parameters()]
            self._copy_average_to_current(pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the raw weights back."""
        if self._raw:
            _copy(self._submodule(pl_module).parameters(), self._raw)
            self._raw = []

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Put the raw weights back before anything saves them."""
        self.on_validation_end(trainer, pl_module)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store the average as ``state_dict`` and the raw weights as ``current_model_state``."""
        if self._average_model is None:
            return
        self._average_model.n_averaged.fill_(self._updates)
        prefix, averaged = f"{self.module}.", self._average_model.state_dict()
        state = checkpoint["state_dict"]
        named = (name for name, _ in self._submodule(pl_module).named_parameters())
        raw = self._raw_at_end or dict(zip(named, self._raw, strict=False))  # none are put aside while training
        checkpoint["current_model_state"] = {k: v for k, v in state.items() if k.startswith(prefix)} | {
            prefix + k: v for k, v in raw.items()
        }
        checkpoint["averaging_state"] = {k: v for k, v in averaged.items() if not k.startswith("module.")}
        if self._has_average():
            checkpoint["state_dict"] = state | {
                prefix + k.removeprefix("module."): v for k, v in averaged.items() if k.startswith("module.")
            }

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore both; a checkpoint written without an average starts one from its weights."""
        if self._average_model is None:
            return
        prefix = f"{self.module}."
        averaged = {
            "module." + k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)
        }
        counts = checkpoint.get("averaging_state", {"n_averaged": torch.tensor(0)})
        self._average_model.load_state_dict(averaged | counts)
        self._updates = int(counts["n_averaged"])
        if "current_model_state" in checkpoint:
            pl_module.load_state_dict(checkpoint["current_model_state"], strict=False)

    def _copy_average_to_current(self, pl_module: L.LightningModule) -> None:
        if self._has_average():
            super()._copy_average_to_current(self._submodule(pl_module))

    def _has_average(self) -> bool:
        return self._average_model is not None and self._updates > 0

    def _update(self, pl_module: L.LightningModule) -> None:
        """Move the average towards the weights; nothing is read back from the device."""
        average, weights = zip(*self._pairs(pl_module), strict=True)
        now = [one.detach().to(other.dtype) for one, other in zip(weights, average, strict=True)]
        if self._updates == 0:
            _copy(average, now)
        else:
            share = (1 + self._updates) / (10 + self._updates)
            decay = min(self.decay, share) if self.warmup else self.decay
            get_ema_multi_avg_fn(decay)([one.detach() for one in average], now, self._updates)
        assert self._average_model is not None
        _copy(self._average_model.module.buffers(), self._submodule(pl_module).buffers())
        self._updates += 1

    def _pairs(self, pl_module: L.LightningModule) -> Iterator[tuple[Tensor, Tensor]]:
        """Return pairs of parameters, of the average and of the submodule."""
        assert self._average_model is not None
        return zip(self._average_model.module.parameters(), self._submodule(pl_module).parameters(), strict=True)

    def _submodule(self, pl_module: L.LightningModule) -> Any:
        module: nn.Module = pl_module.get_submodule(self.module)
        return module


@torch.no_grad()
def _copy(into: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    for tensor, value in zip(into, values, strict=True):
        tensor.copy_(value)
