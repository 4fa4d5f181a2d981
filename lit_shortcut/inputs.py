"""Lookup of inputs: in the current folder, in the project of the YAML in use, or shipped with this package."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info

from lit_shortcut.files import is_remote

SHIPPED = Path(__file__).parent / "shipped"
"""Folder of ``configs`` and ``checkpoints`` of the embedded defaults: links in a clone, copies in a wheel."""

_CONFIGS = "configs"
_projects: list[Path] = []
_said: set[Path] = set()


def located(path: str | Path) -> Path:
    """Return where the input at relative ``path`` is.

    The current folder comes first, then the projects given to :func:`use_projects_of`, then :data:`SHIPPED`; inputs
    from outside the current folder are logged, each once. A path found nowhere is returned unchanged, for its reader to
    refuse. Outputs are never looked for: they go to the current folder.
    """
    path = Path(path)
    if path.is_absolute() or path.exists():
        return path
    for project in (*_projects, SHIPPED):
        if (found := project / path).exists():
            if found not in _said:
                _said.add(found)
                rank_zero_info(f"{path}: taken from {project}; it is not in {Path.cwd()}")
            return found
    return path


def located_source(source: str) -> str:
    """Return ``source`` itself if it is a URL, else its :func:`located` path."""
    return source if is_remote(source) else str(located(source))


def use_projects_of(configs: Iterable[Path]) -> None:
    """Look for inputs in the projects of the YAMLs ``configs`` from now on, and in no others.

    The project of a YAML is the folder that holds the ``configs`` it lies in, or else the YAML's own folder.
    """
    _said.clear()
    _projects[:] = dict.fromkeys(_project_of(config.absolute()) for config in configs)


def _project_of(config: Path) -> Path:
    above = [folder for folder in config.parents if folder.name == _CONFIGS]
    return above[0].parent if above else config.parent
