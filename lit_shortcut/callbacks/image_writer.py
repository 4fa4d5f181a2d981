"""Write what predict draws: a PNG for each picture with its settings inside, and a grid of all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import ceil, sqrt
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image

from lit_shortcut.bounds import require_at_least
from lit_shortcut.contracts import Conditions
from lit_shortcut.evaluation.identity import differences
from lit_shortcut.files import replacing
from lit_shortcut.metrics.latency import device_name
from lit_shortcut.pictures import Drawing, to_pil, write_png
from lit_shortcut.tasks.generating import GenerateTask
from lit_shortcut.trials import is_trial, report_trial
from lit_shortcut.weights import require_writable

_SETTINGS = "settings.json"
_GRID = "grid.png"


class _Batch(NamedTuple):
    """What the summary needs of a batch: base passes by image, and milliseconds an image."""

    full_steps: list[int]
    latency_ms: float


class ImageWriter(BasePredictionWriter):
    """Write ``000000.png``, …, one for each image, ``grid.png``, and ``settings.json``.

    Each PNG's text chunks hold its prompt or label, its seed, and all settings it was drawn with. With
    ``compare``, vanilla's pictures are ``000000_vanilla.png``, …, and stand to the left of the accelerated ones in the
    grid. Latency and base passes are printed.

    The same settings redraw the same pictures in the same folder; pictures of other settings are not overwritten.

    Args:
        folder: folder for the pictures, created if missing.
        overwrite: delete the pictures of other settings in ``folder``.
        grid_images: largest number of pictures in the grid; 0 leaves it out.
    """

    def __init__(self, folder: Path, overwrite: bool = False, grid_images: int = 64) -> None:
        super().__init__("batch")
        require_at_least(0, grid_images=grid_images)
        self.folder, self.overwrite, self.grid_images = Path(folder), overwrite, grid_images

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Raise ValueError if the folder holds other results."""
        super().setup(trainer, pl_module, stage)
        assert isinstance(pl_module, GenerateTask)
        trainer.predict_loop.return_predictions = False
        self.settings = pl_module.settings()
        self.drawn: dict[str, list[_Batch]] = {name: [] for name in self.settings}
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        self.num_images = data.num_images
        settings = {"methods": self.settings, "precision": str(trainer.precision), **_asked(data)}
        self.text = json.dumps(settings, indent=1, ensure_ascii=False) + "\n"
        self.is_trial = is_trial(trainer, "predict")
        if self.is_trial:
            report_trial(self.folder)
        elif not self.overwrite:
            self._require_own()
        trainer.strategy.barrier("folder looked at")

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the settings, and delete pictures of other ones; raise OSError if the folder cannot be written."""
        if not trainer.is_global_zero or self.is_trial:
            return
        require_writable(self.folder)
        mine = {self._path(index, name) for index in range(self.num_images) for name in self.settings}
        for path in set(self.folder.glob("[0-9]" * 6 + "*.png")) - mine:  # other ranks may be writing mine already
            path.unlink()
        with replacing(self.folder / _SETTINGS) as aside:
            aside.write_text(self.text, encoding="utf-8")

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: dict[str, Drawing],
        batch_indices: Sequence[int] | None,
        batch: Conditions,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write the batch's pictures."""
        if self.is_trial:
            return
        for name, drawing in prediction.items():
            images, full_steps = to_pil(drawing.images), drawing.full_steps.tolist()
            for row, (image, passes) in enumerate(zip(images, full_steps, strict=True)):
                wanted = {"prompt": batch.prompts[row]} if batch.prompts else {"label": int(batch.labels[row])}
                own = wanted | {"seed": int(batch.seeds[row]), "base_passes": passes}
                write_png(self._path(int(batch.ids[row]), name), image, own | _flat(self.settings[name]))
            self.drawn[name].append(_Batch(full_steps, drawing.latency_ms))

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write the grid and print a summary; not in ``on_predict_end``, which a rank without batches never reaches."""
        trainer.strategy.barrier("pictures written")
        if not trainer.is_global_zero or self.is_trial:
            return
        shown = range(min(self.num_images, self.grid_images))
        paths = [self._path(index, name) for index in shown for name in self.settings]
        if not all(path.exists() for path in paths):  # interrupted
            return
        if paths:
            grid = _grid([Image.open(path) for path in paths], per_cell=len(self.settings))
            write_png(self.folder / _GRID, grid, {"methods": list(self.settings), "seed": "in each picture's own file"})
        rank_zero_info(f"{self.folder}: {self.num_images} images{f', {_GRID}' if paths else ''}")
        assert isinstance(pl_module, GenerateTask)
        for line in self._latencies(pl_module):
            rank_zero_info(line)

    def _require_own(self) -> None:
        path = self.folder / _SETTINGS
        others = sorted(one.name for one in self.folder.glob("*") if one != path)
        if not others:
            return
        if not path.exists():
            raise ValueError(f"{self.folder}: holds other results ({others[0]}, …); use another folder")
        if changes := differences(_read(path), json.loads(self.text)):
            raise ValueError(
                f"{self.folder}: holds pictures of other settings: {'; '.join(changes)}. Give another folder; "
                "overwrite: true deletes these pictures"
            )

    def _path(self, index: int, name: str) -> Path:
        is_beside = len(self.settings) > 1 and name == next(iter(self.settings))
        return self.folder / f"{index:06d}{'_vanilla' * is_beside}.png"

    def _latencies(self, task: GenerateTask) -> list[str]:
        lines, means = [], {}
        for name, batches in self.drawn.items():
            if not batches:  # all of them went to other ranks
                continue
            passes = fmean(value for batch in batches for value in batch.full_steps)
            weights = [len(batch.full_steps) for batch in batches]
            means[name] = fmean((batch.latency_ms for batch in batches), weights)
            lines.append(
                f"{name}: {passes:.3g} of {task.decoding.num_steps} base passes, {means[name]:.1f} ms an image "
                f"(decoding loop at batch {max(weights)}, {device_name(task.device)})"
            )
        if len(means) > 1:
            (beside, before), (name, after) = means.items()
            lines[-1] += f", {before / after:.2f}× as fast as {beside}"
        return lines


def _asked(data: Any) -> dict[str, Any]:
    """Return what the data module ``data`` asks for."""
    asked = {name: getattr(data, name, ()) for name in ("prompts", "labels")}
    return data.identity() | {"seed": data.seed} | {k: list(v) for k, v in asked.items() if v}


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Return text chunks: the fields of decoding and acceleration by name, the base as one."""
    return {**settings["acceleration"], **settings["decoding"], "base": settings["base"], "Software": "lit-shortcut"}


def _read(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not a settings file ({error}); use another folder") from error
    return content


def _grid(images: list[Image.Image], per_cell: int, gap: int = 2) -> Image.Image:
    """Tile ``images`` row by row, each ``per_cell`` of them side by side."""
    columns = ceil(sqrt(len(images) / per_cell)) * per_cell
    rows = ceil(len(images) / columns)
    width, height = (max(size) for size in zip(*(image.size for image in images), strict=True))
    grid = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for index, image in enumerate(images):
        grid.paste(image, (index % columns * (width + gap), index // columns * (height + gap)))
    return grid
