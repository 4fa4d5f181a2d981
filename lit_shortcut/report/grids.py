"""Grids of images, one row below the other."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import torchvision
from lightning.pytorch.utilities import rank_zero_info
from matplotlib.figure import Figure
from torch import Tensor

from lit_shortcut.evaluation.results import Results
from lit_shortcut.evaluation.rows import Row


def grids(images: Mapping[str, Tensor], captions: Sequence[str] = ()) -> Figure:
    """Show strips of images under one another, each with its name on the left; columns share seed and condition.

    ``images`` maps a row's name to uint8 (3, H, W), as :func:`torchvision.utils.make_grid` lays them out. ``captions``,
    one per column, stand below the last strip; they may be any text.
    """
    captions = [textwrap.fill(caption, width=max(8, 150 // len(captions))) for caption in captions]
    room = 0.15 * max((caption.count("\n") + 1 for caption in captions), default=0)  # inches
    across = 10.2  # inches that a strip takes of the figure's 12
    heights = [max(0.3, across * strip.shape[1] / strip.shape[2]) for strip in images.values()]
    height = sum(heights) + 0.06 * len(heights) + 0.2 + room
    figure, axes = plt.subplots(
        len(images), 1, figsize=(12, height), squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    figure.subplots_adjust(left=0.145, right=0.995, top=1 - 0.1 / height, bottom=(0.1 + room) / height, hspace=0.06)
    label = {"rotation": 0, "ha": "right", "va": "center", "fontsize": 9, "parse_math": False}
    for axis, (name, strip) in zip(axes[:, 0], images.items(), strict=True):
        axis.imshow(strip.permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_ylabel(textwrap.fill(name.replace("_", " "), width=22), **label)
    below = {"transform": axes[-1, 0].transAxes, "ha": "center", "va": "top", "fontsize": 8, "linespacing": 1.1}
    for column, caption in enumerate(captions):
        axes[-1, 0].text((column + 0.5) / len(captions), -0.04, caption, parse_math=False, **below)
    return figure


def strip_paths(results: Results, rows: Sequence[Row], reference: Row) -> dict[str, Path]:
    """Return the PNG files of the strips stored for ``rows`` by name.

    Those drawn for other seeds or conditions than the strip of ``reference``, or than the first where that has none,
    are left out, and the log says so.
    """
    stored = [row for row in rows if results.images_path(row).exists()]
    columns = results.columns(reference if reference in stored else stored[0]) if stored else {}
    alike = [row for row in stored if results.columns(row) == columns]
    if others := [row.name for row in stored if row not in alike]:
        rank_zero_info(
            f"not in the grids, since drawn for other seeds, conditions or numbers of images than {alike[0].name}: "
            f"{', '.join(others)}; to draw them again, delete their files in {results.folder / 'rows'}"
        )
    return {row.name: results.images_path(row) for row in alike}


def read_strips(paths: Mapping[str, Path]) -> dict[str, Tensor]:
    """Return the strips of images in ``paths`` by name, uint8 (3, H, W) each."""
    mode = torchvision.io.ImageReadMode.RGB
    return {name: torchvision.io.read_image(str(path), mode) for name, path in paths.items()}
