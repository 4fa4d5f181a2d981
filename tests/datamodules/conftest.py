from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny_trajectories import write_set


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("set")
    write_set(path, num_samples=17)  # five full shards to train on and one of two samples
    return path
