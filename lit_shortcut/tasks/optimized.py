"""What every trained task shares: an optimiser and a schedule chosen in YAML."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.optim import AdamW

from lit_shortcut.weights import WeightsError, identity


class OptimizedTask(L.LightningModule):
    """A LightningModule that trains its ``network``; the schedule advances once an optimiser step.

    Checkpoints hold the network alone, with what :func:`~lit_shortcut.weights.load_module` needs to build it again:
    whatever else the task keeps (tokenizer, interface) is frozen and comes from its own file.

    Args:
        optimizer: makes the optimiser from parameters.
        scheduler: makes the learning-rate schedule from the optimiser; None keeps the rate.
    """

    network: nn.Module
    strict_loading = False

    def __init__(self, optimizer: OptimizerCallable = AdamW, scheduler: LRSchedulerCallable | None = None) -> None:
        super().__init__()
        self.optimizer, self.scheduler = optimizer, scheduler

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Optimiser over the network's parameters, and the schedule, by the step."""
        optimizer = self.optimizer(self.network.parameters())
        if self.scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.scheduler(optimizer), "interval": "step"},
        }

    def network_facts(self) -> dict[str, Any]:
        """JSON values stored beside the network's weights; a task adds what ties the network to its data."""
        return {}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the network's weights alone, and say what they are."""
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k.startswith("network.")}
        checkpoint["network"] = identity(self.network) | self.network_facts()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse another network's weights, and weights that belong to another base.

        Nothing else would: the frozen parts are in no checkpoint, so Lightning is told not to miss what is not there.

        Raises:
            WeightsError: naming the checkpoint and what differs.
        """
        where = f"{self.trainer.ckpt_path}: not a checkpoint of this configuration"
        if "network" not in checkpoint:
            raise WeightsError(f"{where}, but of no lit-shortcut task at all: it has no key 'network'")
        own, found = _told(identity(self.network) | self.network_facts()), _told(checkpoint["network"])
        changes = [
            f"{name} is {found[name]}, expected {own[name]}" for name in own if own[name] != found.get(name, own[name])
        ]
        expected = {f"network.{name}" for name in self.network.state_dict()}
        changes += [f"{name} is missing" for name in sorted(expected - checkpoint["state_dict"].keys())]
        changes += [f"{name} is unknown" for name in sorted(checkpoint["state_dict"].keys() - expected)]
        if changes:
            raise WeightsError(f"{where}: {'; '.join(changes)}")


def _told(facts: dict[str, Any]) -> dict[str, Any]:
    """Of what is stored beside the weights, all that tells whether they fit."""
    return facts["hparams"] | {name: facts[name] for name in ("class", "base_fingerprint") if name in facts}
