"""Accelerate masked image generation by learned feature transitions (MIGM-Shortcut, arXiv 2602.23996).

    from lit_shortcut import load

    pipe = load("checkpoints/fashion_text", budget=3)
    pipe(["a dark, wide coat"], seeds=[1]).images

The public names are :func:`load` (a base with its shortcut, ready to draw), :class:`Pipeline` and :class:`Pictures`
(what it returns, and what that returns), :class:`Shortcut` (``from_pretrained``, ``save_pretrained``, ``push_to_hub``),
and :func:`enable_shortcut` and :func:`disable_shortcut` for pipelines of diffusers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_shortcut.acceleration.shortcut import Shortcut
    from lit_shortcut.diffusers_pipeline import disable_shortcut, enable_shortcut
    from lit_shortcut.pipeline import Pictures, Pipeline, load

__all__ = ["Pictures", "Pipeline", "Shortcut", "disable_shortcut", "enable_shortcut", "load"]

_MODULES = {
    "Pictures": "pipeline",
    "Pipeline": "pipeline",
    "Shortcut": "acceleration.shortcut",
    "disable_shortcut": "diffusers_pipeline",
    "enable_shortcut": "diffusers_pipeline",
    "load": "pipeline",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for, so that the package itself imports nothing."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
