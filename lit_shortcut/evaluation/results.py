"""Finished rows as files in a folder, so that an interrupted run resumes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torchvision
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lit_shortcut.contracts import Conditions
from lit_shortcut.evaluation.drawing import strip_of
from lit_shortcut.evaluation.identity import differences
from lit_shortcut.evaluation.rows import Row
from lit_shortcut.files import replacing


class Results:
    """Values of finished rows, strips of their images, and latencies.

    A row is finished only under an equal identity; if identities differ, the log says where.

    Args:
        folder: folder of ``rows/``, ``images/``, ``originals/``, ``unfinished/`` and ``latency.json``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(self, row: Row, seed: int, identity: dict[str, Any]) -> dict[str, Any] | None:
        """Return the entry that :meth:`add` stored for a row under an equal ``identity``, else None."""
        stored = self.stored(row, seed)
        if stored is None:
            return None
        changes = differences(stored["identity"], identity)
        if changes:
            rank_zero_info(f"{row.name}, seed {seed}: measured again, since {'; '.join(changes)}")
            return None
        return stored

    def stored(self, row: Row, seed: int) -> dict[str, Any] | None:
        """Return the last entry that :meth:`add` stored for a row, whatever its identity."""
        return _read(self.folder / "rows" / f"{row.name}_seed{seed}.json")

    def add(
        self, row: Row, seed: int, identity: dict[str, Any], values: dict[str, float], full_steps: dict[str, float]
    ) -> None:
        """Store a finished row: the ``values`` of its metrics and its number of base passes, ``full_steps``."""
        content = {"row": row.entry(), "values": values, "full_steps": full_steps, "identity": identity}
        _write(self.folder / "rows" / f"{row.name}_seed{seed}.json", content)

    def unfinished_path(self, row: Row, seed: int, rank: int) -> Path:
        """Return the path of one rank's metric states of an unfinished row."""
        return self.folder / "unfinished" / f"{row.name}_seed{seed}_rank{rank}.safetensors"

    def originals_path(self, seed: int, rank: int) -> Path:
        """Return the folder of one rank's tokens of vanilla, for metrics that compare with its images."""
        return self.folder / "originals" / f"seed{seed}_rank{rank}"

    def add_images(self, row: Row, images: Tensor, conditions: Conditions) -> None:
        """Store ``images``, uint8 (B, 3, H, W), as a strip for the grids, and the ``conditions`` of its columns."""
        path = self.images_path(row)
        with replacing(path) as aside:
            torchvision.io.write_png(strip_of(images), str(aside))
        seeds, labels = conditions.seeds.tolist(), conditions.labels.tolist()
        _write(path.with_suffix(".json"), {"seeds": seeds, "labels": labels, "prompts": list(conditions.prompts)})

    def images_path(self, row: Row) -> Path:
        """Return the path of a row's strip of images."""
        return self.folder / "images" / f"{row.name}.png"

    def columns(self, row: Row) -> dict[str, Any]:
        """Return ``seeds``, ``labels`` and ``prompts`` of the columns of a row's strip; nothing if there is none."""
        return dict(_read(self.images_path(row).with_suffix(".json")) or {})

    def latency(self) -> dict[str, Any]:
        """Return the latencies stored by :meth:`set_latency`; ``measured`` is empty if there are none."""
        return _read(self.folder / "latency.json") or {"identity": {"rows": {}}, "measured": {}}

    def set_latency(self, identity: dict[str, Any], measured: dict[str, dict[str, Any]]) -> None:
        """Store latencies by row name, all measured in one run; ``identity`` holds ``rows`` by name."""
        _write(self.folder / "latency.json", {"identity": identity, "measured": measured})


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:  # not JSON, or not text
        raise ValueError(f"{path}: not a result file ({error}); delete it to measure the row again") from error


def _write(path: Path, content: dict[str, Any]) -> None:
    with replacing(path) as aside:
        aside.write_text(json.dumps(content, indent=1) + "\n")
