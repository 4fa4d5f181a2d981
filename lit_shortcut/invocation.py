"""The command that is running, to be kept beside what it makes."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

_ALIASES = {"lightning": "lit-shortcut"}


def command() -> str:
    """Return the command line of this process, to be pasted into a shell: without the command's folder or alias."""
    name = Path(sys.argv[0]).name
    return shlex.join([_ALIASES.get(name, name), *sys.argv[1:]])
