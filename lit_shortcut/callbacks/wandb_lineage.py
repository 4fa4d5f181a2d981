"""Lineage of a run's inputs and outputs, as artifacts on W&B."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
from lightning.pytorch.loggers import WandbLogger

from lit_shortcut.acceleration.shortcut import Shortcut, shortcut_of
from lit_shortcut.callbacks.export import ExportWeights
from lit_shortcut.loggers import carry_on, log_artifact
from lit_shortcut.tasks.evaluation import EvaluationTask
from lit_shortcut.tasks.shortcut import ShortcutTask
from lit_shortcut.weights import fingerprint, load_tensors

_SHORTCUT = "shortcut"
_SET = "trajectories"


class WandbLineage(L.Callback):
    """Log the card of the set and the exported network as artifacts, and record which of them a run used.

    An artifact's name ends in the fingerprint of what it holds, so that ``test`` finds the shortcut that ``fit`` logged
    wherever its file is now. What a run uses is listed in its configuration under ``uses`` and, online, linked as an
    artifact. Does nothing if W&B is not among the loggers.
    """

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the set's card, and mark it as used."""
        card: Any = getattr(getattr(trainer, "datamodule", None), "card", None)
        if card is None or not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        with TemporaryDirectory() as folder, carry_on("logging the set's card"):
            card.write(Path(folder))
            name = f"{_SET}-{card.digest}"
            path = Path(folder, "card.json")
            log_artifact(trainer, name, _SET, [path], json.loads(path.read_text()))
            _use(trainer, [name])

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Log the network that this run exported; not in ``on_fit_end``, since the export may come later."""
        if stage != "fit" or not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, ExportWeights) and callback.written is not None:
                with carry_on(f"logging {callback.written}"):
                    tensors, metadata = load_tensors(callback.written)
                    if isinstance(pl_module, ShortcutTask):  # named as loaded, in float32
                        name = _name_of(Shortcut.load(callback.written))
                    else:
                        name = f"{callback.written.stem}-{fingerprint(tensors)}"
                    log_artifact(trainer, name, "model", [callback.written], metadata)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Mark the shortcuts of all rows as used."""
        if not isinstance(pl_module, EvaluationTask) or not trainer.is_global_zero:
            return
        found = (shortcut_of(row.acceleration) for row in pl_module.rows)
        names = dict.fromkeys(_name_of(shortcut) for shortcut in found if shortcut is not None)
        _use(trainer, list(names))


def _name_of(shortcut: Shortcut) -> str:
    return f"{_SHORTCUT}-{shortcut.identity()['weights']}"


def _use(trainer: L.Trainer, names: list[str]) -> None:
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger) and names:
            run = logger.experiment
            run.config.update({"uses": names}, allow_val_change=True)
            for name in [] if run.offline or run.disabled else names:
                with carry_on(f"looking up the artifact {name}"):
                    run.use_artifact(f"{name}:latest")
