"""Reference files: statistics and features of real images for the distances of generated ones."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from lit_shortcut.bounds import require_at_least
from lit_shortcut.inputs import located
from lit_shortcut.metrics.images import FrozenNetwork
from lit_shortcut.weights import WeightsError, fingerprint, load_tensors, save_tensors


class FeatureStatistics:
    """Mean and covariance of the features of images, accumulated batch by batch in double precision.

    Features of a random subset are kept for metrics that need more than two moments. The subset depends on ``seed`` and
    the order of the images, not on batches.

    Args:
        extractor: network from uint8 images (B, 1 or 3, H, W) to features (B, F); put into eval mode and frozen.
        num_features: size of the subset, at most.
        seed: seed of the subset.
    """

    def __init__(self, extractor: nn.Module, num_features: int = 0, seed: int = 0) -> None:
        require_at_least(0, num_features=num_features)
        self.extractor, self.count, self.num_features = FrozenNetwork(extractor), 0, num_features
        self.total = self.products = torch.zeros((), dtype=torch.float64)
        self.generator = torch.Generator().manual_seed(seed)
        self.draws = torch.empty(0, dtype=torch.float64)  # the subset is the images of the smallest draws
        self.kept: Tensor | None = None

    def update(self, images: Tensor) -> None:
        """Add uint8 ``images`` (B, 1 or 3, H, W) on the extractor's device."""
        features = self.extractor(images).cpu()
        draws = torch.rand(len(features), generator=self.generator, dtype=torch.float64)
        draws = torch.cat([self.draws, draws])
        self.draws, chosen = draws.sort()
        self.draws, chosen = self.draws[: self.num_features], chosen[: self.num_features]
        self.kept = (features if self.kept is None else torch.cat([self.kept, features]))[chosen]
        exact = features.double()
        self.count += len(exact)
        self.total, self.products = self.total + exact.sum(0), self.products + exact.T @ exact

    def save(self, path: Path, images: str) -> None:
        """Write the reference file; ``images`` names the images.

        Raises:
            ValueError: if there are fewer than 2 images.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs 2 images or more, got {self.count}")
        mean = self.total / self.count
        covariance = (self.products - self.count * mean.outer(mean)) / (self.count - 1)
        tensors = {"mean": mean, "covariance": covariance}
        if self.kept is not None and self.num_features:
            tensors["features"] = self.kept.float()
        extractor = fingerprint(self.extractor.module.state_dict())
        save_tensors(path, tensors, {"extractor": extractor, "num_images": self.count, "images": images})


def load_reference(path: Path, extractor: nn.Module, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Return the tensors ``names`` (``mean`` (F,), ``covariance`` (F, F), ``features`` (K, F)) of the file at ``path``.

    Args:
        path: file that :class:`FeatureStatistics` wrote.
        extractor: the metric's network, with ``num_features`` (F).
        names: names of the tensors to return.

    Raises:
        WeightsError: if the file is missing or damaged, was made with another extractor, or lacks one of ``names``.
    """
    path = located(path)
    if not path.is_file():
        raise WeightsError(
            f"{path}: no such file of reference statistics; write it by `lit-shortcut predict` with "
            "lit_shortcut.tasks.reference.ReferenceTask, for ImageNet by configs/maskgit/reference.yaml"
        )
    tensors, metadata = load_tensors(path)
    own, width = fingerprint(extractor.state_dict()), int(extractor.num_features)  # type: ignore[arg-type]
    if metadata.get("extractor") != own or tensors.get("mean", torch.empty(0)).shape != (width,):
        raise WeightsError(
            f"{path}: expected statistics of extractor {own} with {width} features, found "
            f"{metadata.get('extractor')} with {len(tensors.get('mean', []))}; write it again with ReferenceTask"
        )
    if missing := [name for name in names if name not in tensors]:
        raise WeightsError(
            f"{path}: lacks the {missing[0]} of reference images, which this metric needs; write the file again with "
            "num_reference_features of ReferenceTask set, for example to 10000"
        )
    return {name: tensors[name] for name in names}
