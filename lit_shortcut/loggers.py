"""Logging of pictures, tables and files to a trainer's loggers; a failure is logged and does not end the run."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import pandas as pd
import torchvision
import wandb
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor

_log = logging.getLogger(__name__)


@contextmanager
def carry_on(what: str) -> Iterator[None]:
    """Log an exception within the block as a failure of ``what``: results are worth more than a picture of them."""
    try:
        yield
    except Exception:
        _log.exception("%s failed; the run continues without it", what)


def log_picture(trainer: L.Trainer, name: str, picture: Tensor) -> None:
    """Log ``picture``, uint8 (3, H, W), to W&B and TensorBoard; for other loggers write a PNG into the log folder."""
    for logger in _loggers(trainer):
        with carry_on(f"logging the picture {name} to {type(logger).__name__}"):
            if isinstance(logger, WandbLogger):
                logger.log_image(name, [picture.permute(1, 2, 0).numpy()])
            elif isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image(name, picture, trainer.global_step)
            else:
                path = _folder(trainer, logger) / f"{name.replace('/', '_')}_step{trainer.global_step}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                torchvision.io.write_png(picture, str(path))


def log_table(trainer: L.Trainer, name: str, table: pd.DataFrame) -> None:
    """Log ``table`` to W&B as a table and to TensorBoard as Markdown; for others write a CSV into the log folder."""
    for logger in _loggers(trainer):
        with carry_on(f"logging the table {name} to {type(logger).__name__}"):
            if isinstance(logger, WandbLogger):
                logger.log_table(name, dataframe=table)
            elif isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text(name, table.to_markdown(index=False), trainer.global_step)
            else:
                path = _folder(trainer, logger) / f"{name.replace('/', '_')}.csv"
                path.parent.mkdir(parents=True, exist_ok=True)
                table.to_csv(path, index=False)


def log_page(trainer: L.Trainer, name: str, path: Path) -> None:
    """Log the self-contained HTML file ``path`` to W&B; other loggers cannot show it."""
    for logger in _loggers(trainer):
        if isinstance(logger, WandbLogger):
            with carry_on(f"logging the page {name}"):
                logger.experiment.log({name: wandb.Html(str(path), inject=False)})


def log_artifact(
    trainer: L.Trainer, name: str, kind: str, paths: Sequence[Path], metadata: dict[str, Any] | None = None
) -> None:
    """Log the files ``paths`` to W&B as an artifact of type ``kind``; other loggers have no artifacts."""
    for logger in _loggers(trainer):
        if isinstance(logger, WandbLogger):
            with carry_on(f"logging the artifact {name}"):
                artifact = wandb.Artifact(name, type=kind, metadata=metadata)
                for path in paths:
                    artifact.add_file(str(path))
                logger.experiment.log_artifact(artifact)


def _loggers(trainer: L.Trainer) -> list[Logger]:
    """Return the trainer's loggers without the dummies of ``fast_dev_run``."""
    return [logger for logger in trainer.loggers if not isinstance(logger, DummyLogger)]


def _folder(trainer: L.Trainer, logger: Logger) -> Path:
    return Path(logger.log_dir or logger.save_dir or trainer.default_root_dir)
