"""Reference statistics in one call, for tests."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from torch import Tensor, nn

from lit_shortcut.metrics.reference import FeatureStatistics


def write_reference(
    path: Path, extractor: nn.Module, batches: Iterable[Tensor], images: str, num_features: int = 0
) -> None:
    statistics = FeatureStatistics(extractor, num_features)
    for batch in batches:
        statistics.update(batch)
    statistics.save(path, images)
