"""Finished rows as files in a folder, so that a run that was stopped goes on where it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torchvision
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lit_shortcut.evaluation.drawing import strip_of
from lit_shortcut.evaluation.identity import differences
from lit_shortcut.evaluation.rows import Row
from lit_shortcut.files import replacing

_PROMPTS = "prompts.json"


class Results:
    """Values of finished rows, strips of their images, and latencies.

    A row counts as finished only under an equal identity; where it differs, the log says in what.

    Args:
        folder: holds ``rows/``, ``images/``, ``unfinished/`` and ``latency.json``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(self, row: Row, seed: int, identity: dict[str, Any]) -> dict[str, Any] | None:
        """Return what :meth:`add` stored of a row under an equal ``identity``, else None."""
        stored = self.stored(row, seed)
        if stored is None:
            return None
        if "identity" not in stored:
            rank_zero_info(f"{row.name}, seed {seed}: measured again, it was stored without its identity")
            return None
        changes = differences(stored["identity"], identity)
        if changes:
            rank_zero_info(f"{row.name}, seed {seed}: measured again, since {'; '.join(changes)}")
            return None
        return stored

    def stored(self, row: Row, seed: int) -> dict[str, Any] | None:
        """Return what :meth:`add` stored of a row last, under whatever identity."""
        return _read(self.folder / "rows" / f"{row.name}_seed{seed}.json")

    def add(
        self, row: Row, seed: int, identity: dict[str, Any], values: dict[str, float], full_steps: dict[str, float]
    ) -> None:
        """Store a finished row: the ``values`` of its metrics and its base passes, ``full_steps``."""
        content = {"row": row.entry(), "values": values, "full_steps": full_steps, "identity": identity}
        _write(self.folder / "rows" / f"{row.name}_seed{seed}.json", content)

    def unfinished_path(self, row: Row, seed: int, rank: int) -> Path:
        """Return where one rank keeps what it has measured of a row that is not finished."""
        return self.folder / "unfinished" / f"{row.name}_seed{seed}_rank{rank}.safetensors"

    def add_images(self, row: Row, images: Tensor, prompts: tuple[str, ...] = ()) -> None:
        """Store ``images``, uint8 (B, 3, H, W), as a strip for the grids, and the ``prompts`` they were made for."""
        path = self.images_path(row)
        with replacing(path) as aside:
            torchvision.io.write_png(strip_of(images), str(aside))
        if prompts:
            _write(path.with_name(_PROMPTS), list(prompts))

    def images_path(self, row: Row) -> Path:
        """Return where a row's strip of images is."""
        return self.folder / "images" / f"{row.name}.png"

    def prompts(self) -> list[str]:
        """Return the prompts of the strips' columns; none where classes were asked for."""
        return list(_read(self.folder / "images" / _PROMPTS) or [])

    def latency(self) -> dict[str, Any]:
        """Return what :meth:`set_latency` stored; ``measured`` is empty if nothing."""
        return _read(self.folder / "latency.json") or {"identity": {"rows": {}}, "measured": {}}

    def set_latency(self, identity: dict[str, Any], measured: dict[str, dict[str, Any]]) -> None:
        """Store latencies by row name, all measured in one run; ``identity`` has ``rows`` by name."""
        _write(self.folder / "latency.json", {"identity": identity, "measured": measured})


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:  # no JSON, or no text at all
        raise ValueError(f"{path}: not a result file ({error}); delete it and it is measured again") from error


def _write(path: Path, content: dict[str, Any] | list[str]) -> None:
    with replacing(path) as aside:
        aside.write_text(json.dumps(content, indent=1) + "\n")
