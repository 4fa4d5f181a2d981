"""Checkpoints written atomically."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from lit_shortcut.files import whole


class WholeCheckpointIO(TorchCheckpointIO):
    """Plugin that writes a checkpoint beside its place and renames it once it is on the disk.

    Lightning writes it below ``TMPDIR`` and moves it, which copies if that is another file system: a kill would then
    leave half a checkpoint in place of the last one. Checkpoints at a URL are left to Lightning.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Save ``checkpoint`` at ``path``; until that succeeds, an older file stays there.

        Raises:
            OSError: naming the file, if it cannot be written.
        """
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with whole(Path(path)) as file:
            torch.save(checkpoint, file)
