"""The command that is running, to be kept beside what it makes."""

from __future__ import annotations

import shlex
import sys


def command() -> str:
    """Return the command line of this process, as it can be pasted into a shell."""
    return shlex.join(["lit-shortcut", *sys.argv[1:]])
