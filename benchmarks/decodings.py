"""How the bases draw tokens, as ``configs/parts`` has it."""

from __future__ import annotations

from pathlib import Path

import yaml

from lit_shortcut.sampling import Decoding

_PARTS = Path(__file__).parents[1] / "configs" / "parts"


def decoding_of(base: str) -> Decoding:
    """Return the decoding of ``base``, such as ``fashion``."""
    return Decoding.from_values(yaml.safe_load((_PARTS / f"{base}_decoding.yaml").read_text()))
