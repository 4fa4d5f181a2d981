from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def lightnings_log_level() -> Iterator[None]:
    """Give back the level that benchmarks, being programs of their own, set for good."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    yield
    logger.setLevel(level)
