"""Reference statistics in one call, and images as torch-fidelity takes them, for tests."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from torch import Tensor, nn
from torch.utils.data import Dataset

from lit_shortcut.metrics.reference import FeatureStatistics


def write_reference(
    path: Path, extractor: nn.Module, batches: Iterable[Tensor], images: str, num_features: int = 0
) -> None:
    statistics = FeatureStatistics(extractor, num_features)
    for batch in batches:
        statistics.update(batch)
    statistics.save(path, images)


class Images(Dataset[Tensor]):
    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]

    def __len__(self) -> int:
        return len(self.images)
