"""The project's verbs, as a user runs them."""

from __future__ import annotations

import subprocess
import sys


def run(*words: str) -> None:
    """Run ``lightning <words>`` in a process of its own."""
    subprocess.run([sys.executable, "-m", "lit_shortcut.cli", *words], check=True)  # noqa: S603 - our own verbs
