"""Checkpoints that are whole or not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from lit_shortcut.files import whole


class WholeCheckpointIO(TorchCheckpointIO):
    """Write a checkpoint beside its place, and rename it once it is on the disk.

    Lightning's own way writes it below ``TMPDIR`` and moves it, which copies where that is another file system: a kill
    meanwhile would leave half a checkpoint in the place of the last one. Checkpoints at a URL go Lightning's way.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Save ``checkpoint`` at ``path``; what was there before stays until then, and if the disk is full.

        Raises:
            OSError: naming the file, if it cannot be written.
        """
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with whole(Path(path)) as file:
            torch.save(checkpoint, file)
