"""Write a trained network when fit ends, and enter it in the manifest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from torch import nn

from lit_shortcut.acceleration.card import PICTURES
from lit_shortcut.acceleration.origin import CARD, PLAN, WEIGHTS, BaseReference, Origin
from lit_shortcut.acceleration.shortcut import Shortcut
from lit_shortcut.bounds import require_at_least
from lit_shortcut.callbacks.ema import ModuleEMA
from lit_shortcut.tasks.optimized import OptimizedTask
from lit_shortcut.tasks.shortcut import ShortcutTask
from lit_shortcut.trials import is_trial, require_writable_file
from lit_shortcut.weights import WeightsError, fingerprint, load_tensors, save_module, update_manifest


class ExportWeights(L.Callback):
    """Save ``pl_module.network`` (averaged, where an EMA runs) to ``path`` after the last step of fit.

    Args:
        path: safetensors file; ``manifest.yaml`` beside it gets an entry.
        licence: SPDX identifier of the weights.
        trained_on: name of the training data, for the manifest.
        dtype: dtype of the stored weights; None keeps the network's. Weights are loaded in float32 all the same.
    """

    def __init__(
        self, path: Path, licence: str, trained_on: str, dtype: Literal["float16", "bfloat16"] | None = None
    ) -> None:
        self.path, self.facts = path, {"licence": licence, "trained_on": trained_on}
        self.written: Path | None = None  # the weight file, once there is one
        self.dtype: torch.dtype | None = None if dtype is None else getattr(torch, dtype)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check, before anything is trained, that the file can be written; raise OSError if not."""
        if stage == "fit":
            require_writable_file(trainer, "fit", self.path)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the file on the first rank, unless this was a trial run."""
        if not trainer.is_global_zero or is_trial(trainer, "fit"):
            return
        assert isinstance(pl_module, OptimizedTask)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]  # its average goes first, wherever it stands
            if isinstance(callback, ModuleEMA):
                callback.on_fit_end(trainer, pl_module)
        self.written = self.write(pl_module)
        update_manifest(self.written, self.facts | _outcome(trainer), self.path.with_name("manifest.yaml"))

    def write(self, task: OptimizedTask) -> Path:
        """Write ``task.network``; return its weight file."""
        save_module(self.path, task.network, task.network_facts(), self.dtype)
        return self.path


class ExportFolder(ExportWeights):
    """Like :class:`ExportWeights`, for a network that writes a folder in a format of its own.

    Args:
        path: folder for ``pl_module.network.save``; ``manifest.yaml`` beside it gets an entry.
        licence: SPDX identifier of the weights.
        trained_on: name of the training data, for the manifest.
    """

    def __init__(self, path: Path, licence: str, trained_on: str) -> None:
        super().__init__(path, licence, trained_on)

    def write(self, task: OptimizedTask) -> Path:
        """Let ``task.network`` save itself; return its weight file."""
        network: Any = task.network
        return network.save(self.path)


class ExportShortcut(ExportWeights):
    """Like :class:`ExportWeights`, for a shortcut as a folder for :func:`lit_shortcut.load` and the hub.

    Args:
        path: folder for ``model.safetensors``, ``config.json`` and a model card; ``manifest.yaml`` beside it gets an
            entry.
        licence: SPDX identifier of the weights.
        trained_on: name of the training data, for configuration, card and manifest.
        base: where to get the base: ``name``, ``source``, ``revision``, ``arguments``; the fingerprint is that of the
            trajectories.
        plan: name of the plan that the shortcut is meant for.
        budget: b of that plan, at most N; 0 leaves it to the user.
    """

    def __init__(
        self,
        path: Path,
        licence: str,
        trained_on: str,
        base: BaseReference | None = None,
        plan: Literal["even", "early"] = "even",
        budget: int = 0,
    ) -> None:
        require_at_least(0, budget=budget)
        super().__init__(path, licence, trained_on)
        self.origin = Origin(base or BaseReference(), 0, {}, plan, budget, licence, trained_on)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check, before anything is trained, that the folder can be written and has a budget within the set's N.

        Raises:
            ValueError: if the budget is above N.
            OSError: if the folder cannot be written.
        """
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        num_steps, budget = trainer.datamodule.card.num_steps, self.origin.budget  # type: ignore[attr-defined]
        if budget > num_steps:
            raise ValueError(f"budget of ExportShortcut must lie in 0..{num_steps}, the set's steps; got {budget}")

    def write(self, task: OptimizedTask) -> Path:
        """Write the folder; return its weight file."""
        assert isinstance(task, ShortcutTask)
        recorded = Origin.of_metadata(task.network_facts())
        base = replace(self.origin.base, fingerprint=recorded.base.fingerprint)
        origin = replace(
            self.origin,
            base=base,
            num_steps=recorded.num_steps,
            decoding=recorded.decoding,
            num_classes=recorded.num_classes,
        )
        if not self._is_there(task.network):
            for name in (CARD, PLAN, *PICTURES):  # of the shortcut that was here; saving would keep its card
                (self.path / name).unlink(missing_ok=True)
        Shortcut(task.network, base.fingerprint, origin=origin).save_pretrained(self.path)
        return self.path / WEIGHTS

    def _is_there(self, network: nn.Module) -> bool:
        """Return whether the folder holds the weights of ``network``: a finished run was resumed."""
        try:
            return fingerprint(load_tensors(self.path / WEIGHTS)[0]) == fingerprint(network.state_dict())
        except WeightsError:
            return False


def _outcome(trainer: L.Trainer) -> dict[str, Any]:
    """Return the number of optimiser steps and the last validation metrics."""
    metrics = {name: round(float(v), 6) for name, v in trainer.callback_metrics.items() if not name.startswith("train")}
    return {"optimizer_steps": trainer.global_step, "metrics": metrics}
