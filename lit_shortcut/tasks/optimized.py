"""Parent of all trained tasks: an optimiser and a schedule chosen in YAML."""

from __future__ import annotations

import sys
from typing import Any, ClassVar

import lightning as L
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lit_shortcut.tasks.resuming import prefer, store, yaml_settings
from lit_shortcut.weights import WeightsError, identity


class OptimizedTask(L.LightningModule):
    """A LightningModule that trains its ``network``; the schedule advances once an optimiser step.

    Checkpoints hold only the network, with what :func:`~lit_shortcut.weights.load_module` needs to build it again:
    whatever else the task keeps (tokenizer, interface) is frozen and comes from its own file.

    Args:
        network: the network to train, new or loaded.
        optimizer: makes the optimiser from parameters.
        scheduler: makes the learning-rate schedule from the optimiser; None keeps the rate.
    """

    network: nn.Module
    strict_loading = False
    monitor: ClassVar[str] = "val/loss"
    """What torch's own ReduceLROnPlateau watches; Lightning's has a monitor of its own."""

    def __init__(
        self, network: nn.Module, optimizer: OptimizerCallable = AdamW, scheduler: LRSchedulerCallable | None = None
    ) -> None:
        super().__init__()
        self.network = network.train().requires_grad_()  # what was loaded, or belongs to a base, is frozen
        self.optimizer, self.scheduler = optimizer, scheduler
        self._settings: dict[str, Any] | None = None

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Optimiser over the network's parameters, and the schedule, by the step or, on a plateau, by the validation.

        Raises:
            ValueError: if the schedule is shorter than the run, or cannot be made.
        """
        optimizer, scheduler = self._optimizer_and_scheduler()
        self._settings = yaml_settings(optimizer, scheduler)
        if scheduler is None:
            return optimizer
        total = getattr(scheduler, "total_steps", None)
        if total is not None and (steps := self.trainer.estimated_stepping_batches) > total:
            raise ValueError(
                f"model.scheduler: total_steps is {total}, but trainer.max_steps and max_epochs ask for {steps} "
                "optimiser steps; set total_steps to at least as many"
            )
        if not isinstance(scheduler, ReduceLROnPlateau):
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
        return {  # stepped by on_validation_end: Lightning counts steps or epochs, and validation may follow neither
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "monitor": self._monitor_of(scheduler), "frequency": sys.maxsize},
        }

    def on_validation_end(self) -> None:
        """Step a schedule that reacts to a plateau.

        Raises:
            ValueError: if the monitored value was not logged.
        """
        fits = self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking
        scheduler = self.lr_schedulers() if fits else None
        if isinstance(scheduler, ReduceLROnPlateau):
            monitor, measured = self._monitor_of(scheduler), self.trainer.callback_metrics
            if monitor not in measured:
                raise ValueError(f"model.scheduler: monitor {monitor!r} was not measured; there are {sorted(measured)}")
            scheduler.step(float(measured[monitor]))

    def _monitor_of(self, scheduler: ReduceLROnPlateau) -> str:
        return str(getattr(scheduler, "monitor", self.monitor))  # torch's own class has none

    def _optimizer_and_scheduler(self) -> tuple[Optimizer, LRScheduler | None]:
        optimizer = self.optimizer(self.network.parameters())
        if self.scheduler is None:
            return optimizer, None
        try:
            return optimizer, self.scheduler(optimizer)
        except ValueError as error:
            raise ValueError(
                f"model.scheduler: {error} (trainer.max_steps is {self.trainer.max_steps}; where total_steps is "
                "${trainer.max_steps}, set it)"
            ) from error

    def network_facts(self) -> dict[str, Any]:
        """Return JSON values stored beside the weights; tasks add those that tie the network to its data."""
        return {}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep only the network's weights, with their metadata."""
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k.startswith("network.")}
        checkpoint["network"] = identity(self.network) | self.network_facts()
        if self._settings is not None:
            store(self._settings, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse another network's weights and weights that belong to another base; let changes in the YAML hold.

        Nothing else would: the frozen parts are in no checkpoint, so Lightning must not miss what is not there.

        Raises:
            WeightsError: naming the checkpoint and what differs.
        """
        where = f"{self.trainer.ckpt_path}: not a checkpoint of this configuration"
        if "network" not in checkpoint:
            raise WeightsError(f"{where}, but of no lit-shortcut task at all: it has no key 'network'")
        own, found = _deciding(identity(self.network) | self.network_facts()), _deciding(checkpoint["network"])
        changes = [
            f"{name} is {found[name]}, expected {own[name]}" for name in own if own[name] != found.get(name, own[name])
        ]
        expected = {f"network.{name}" for name in self.network.state_dict()}
        changes += [f"{name} is missing" for name in sorted(expected - checkpoint["state_dict"].keys())]
        changes += [f"{name} is unknown" for name in sorted(checkpoint["state_dict"].keys() - expected)]
        if changes:
            raise WeightsError(f"{where}: {'; '.join(changes)}")
        if self.trainer.state.fn == TrainerFn.FITTING:
            prefer(*self._optimizer_and_scheduler(), checkpoint, str(self.trainer.ckpt_path))


def _deciding(facts: dict[str, Any]) -> dict[str, Any]:
    """Return the metadata beside the weights that decide whether they fit."""
    return facts["hparams"] | {name: facts[name] for name in ("class", "base_fingerprint") if name in facts}
