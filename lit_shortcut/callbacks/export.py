"""Write a trained network as safetensors when fit ends, and enter it in the manifest."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning as L

from lit_shortcut.tasks.optimized import OptimizedTask
from lit_shortcut.weights import require_writable, save_module, update_manifest


class ExportWeights(L.Callback):
    """Save ``pl_module.network`` (averaged, where an EMA runs) to ``path`` after the last step of fit.

    Args:
        path: safetensors file; ``manifest.yaml`` beside it gets an entry.
        licence: SPDX identifier of the weights.
        trained_on: the data, for the manifest.
    """

    def __init__(self, path: Path, licence: str, trained_on: str) -> None:
        self.path, self.facts = path, {"licence": licence, "trained_on": trained_on}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a place that cannot be written, before anything is trained; raises OSError."""
        if stage == "fit" and trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            require_writable(self.path.parent)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the file on the first rank, unless this was a trial run."""
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        assert isinstance(pl_module, OptimizedTask)
        save_module(self.path, pl_module.network, pl_module.network_facts())
        update_manifest(self.path, self.facts | made_by(trainer))


def made_by(trainer: L.Trainer) -> dict[str, Any]:
    """The command, its length, and the validation metrics it ended with."""
    metrics = {name: round(float(v), 6) for name, v in trainer.callback_metrics.items() if not name.startswith("train")}
    command = " ".join(["lightning", *sys.argv[1:]])
    return {"made_by": command, "optimizer_steps": trainer.global_step, "metrics": metrics}
