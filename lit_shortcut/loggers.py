"""Pictures and tables to whichever loggers a trainer has."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pandas as pd
import torchvision
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from torch import Tensor


def log_picture(trainer: L.Trainer, name: str, picture: Tensor) -> None:
    """Log ``picture``, uint8 (3, H, W): to W&B and TensorBoard as they do, elsewhere as a PNG in the log folder."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image(name, [picture.permute(1, 2, 0).numpy()])
        elif isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(name, picture, trainer.global_step)
        else:
            path = _folder(trainer, logger) / f"{name.replace('/', '_')}_step{trainer.global_step}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            torchvision.io.write_png(picture, str(path))


def log_table(trainer: L.Trainer, name: str, table: pd.DataFrame) -> None:
    """Log ``table``: to W&B as a table, to TensorBoard as Markdown, elsewhere as CSV in the logger's folder."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_table(name, dataframe=table)
        elif isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(name, table.to_markdown(index=False), trainer.global_step)
        else:
            path = _folder(trainer, logger) / f"{name.replace('/', '_')}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            table.to_csv(path, index=False)


def _folder(trainer: L.Trainer, logger: Logger) -> Path:
    return Path(logger.log_dir or logger.save_dir or trainer.default_root_dir)
