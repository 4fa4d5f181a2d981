"""What vanilla drew, kept on disk, so that a row added later is compared with it without drawing it again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info

from lit_shortcut.contracts import MaskedImageModel
from lit_shortcut.evaluation.drawing import Drawn
from lit_shortcut.evaluation.identity import differences
from lit_shortcut.weights import WeightsError, load_tensors, save_tensors


class Originals:
    """Tokens of vanilla at one run seed, on one rank; their images are decoded again, which takes a fraction of a run.

    Args:
        folder: one file for each batch.
        key: everything the tokens depend on; a file with another key is not used, and the log says why.
    """

    def __init__(self, folder: Path, key: dict[str, Any]) -> None:
        self.folder, self.key = folder, key

    def find(self, index: int, base: MaskedImageModel, device: torch.device) -> Drawn | None:
        """Return what :meth:`add` stored of batch ``index``, decoded by ``base`` on ``device``; None without a file."""
        path = self._path(index)
        if not path.exists():
            return None
        try:
            tensors, metadata = load_tensors(path)
            changes = differences(metadata.get("key"), self.key)
            tokens, full_steps = (tensors[name].to(device) for name in ("tokens", "full_steps"))
        except (WeightsError, KeyError) as error:
            rank_zero_info(f"{path}: drawn again, it cannot be read ({error})")
            return None
        if changes:
            rank_zero_info(f"{path}: drawn again, since {'; '.join(changes)}")
            return None
        return Drawn(base.decode(tokens), full_steps, tokens)

    def add(self, index: int, drawn: Drawn) -> None:
        """Store what vanilla drew of batch ``index``."""
        kept = {"tokens": drawn.tokens, "full_steps": drawn.full_steps}
        tensors = {name: tensor.cpu().contiguous() for name, tensor in kept.items()}
        save_tensors(self._path(index), tensors, {"key": self.key})

    def _path(self, index: int) -> Path:
        return self.folder / f"batch{index:06d}.safetensors"
