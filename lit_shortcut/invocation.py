"""The command that is running, to be kept beside what it makes."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path


def command() -> str:
    """Return the command line of this process without the folder of the command, to be pasted into a shell."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
