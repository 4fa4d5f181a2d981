"""Which code, packages and command made a report."""

from __future__ import annotations

import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from lit_shortcut.invocation import command

_PACKAGES = ("lit-shortcut", "torch", "lightning", "torchmetrics", "torch-fidelity", "diffusers", "transformers")


def provenance() -> dict[str, str]:
    """Return commit, versions and command by name, for people."""
    installed = {name: found for name, found in versions().items() if found is not None}
    return {"commit": commit() or "no git checkout"} | installed | {"command": command()}


def versions() -> dict[str, str | None]:
    """Return the versions of Python and of the packages that figures depend on; None where one is not installed."""
    return {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES}


def commit(source: Path = Path(__file__)) -> str | None:
    """Return the git commit of the checkout that tracks ``source``, with ``-dirty`` appended if files differ.

    None if there is no git or no such checkout, as in an installed wheel.
    """
    git = shutil.which("git")
    if git is None or _git(git, source, "ls-files", "--error-unmatch", source.name) is None:
        return None
    return _git(git, source, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")


def _git(git: str, source: Path, *words: str) -> str | None:
    done = subprocess.run(  # noqa: S603 - fixed words, and a path of this package
        [git, "-C", str(source.parent), *words], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
