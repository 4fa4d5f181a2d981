"""Distances between generated and real images in the features of a network, by torch-fidelity's own arithmetic.

All depend on the number of images: compare values at equal numbers only. With
:class:`~lit_shortcut.metrics.inception.InceptionFeatures` they are the published FID, KID, Inception Score, precision
and recall; with other networks they are not comparable with published values: name them after the network.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch_fidelity.metric_fid import fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from torchmetrics.utilities import dim_zero_cat

from lit_shortcut.bounds import require_at_least
from lit_shortcut.contracts import Conditions
from lit_shortcut.metrics.images import FrozenNetwork, ImageMetric
from lit_shortcut.metrics.reference import load_reference
from lit_shortcut.weights import fingerprint


class FeatureMetric(ImageMetric):
    """Metric of the features of all generated images together.

    Features are sorted by the images' ids, so that neither batches nor ranks change a value. The state is flat, so that
    a rank without images fits the others.

    Args:
        extractor: network from uint8 images (B, 3, H, W) to features (B, F).
    """

    features: list[Tensor]
    ids: list[Tensor]

    def __init__(self, extractor: nn.Module) -> None:
        super().__init__()
        self.extractor = FrozenNetwork(extractor)
        self.add_state("features", [], dist_reduce_fx="cat")
        self.add_state("ids", [], dist_reduce_fx="cat")

    def update(self, images: Tensor, conditions: Conditions) -> None:
        """Add uint8 ``images`` (B, 3, H, W)."""
        self.features.append(self.extractor(images).float().flatten())
        self.ids.append(conditions.ids)

    def gathers(self) -> object:
        """Return a key that metrics with equal extractors share."""
        return json.dumps(self.extractor.identity, sort_keys=True)

    def gathered(self) -> Tensor:
        """Return the features (number of images, F) of all ranks, on the CPU.

        Raises:
            ValueError: if there are fewer than 2 images.
        """
        ids = dim_zero_cat(self.ids) if len(self.ids) else torch.empty(0)
        if len(ids) < 2:
            raise ValueError(f"{type(self).__name__} needs 2 images or more, got {len(ids)}")
        return dim_zero_cat(self.features).view(len(ids), -1)[ids.argsort(stable=True)].cpu()

    def _sync_dist(self, *args: Any, **kwargs: Any) -> None:
        if not self.ids:  # a rank without images: torchmetrics would not know the dtype of the ids
            self.features.append(torch.zeros(0, device=self.device))
            self.ids.append(torch.zeros(0, dtype=torch.long, device=self.device))
        super()._sync_dist(*args, **kwargs)


class ReferenceMetric(FeatureMetric):
    """Metric of generated features against those of real images in a reference file.

    Args:
        extractor: network with ``num_features`` (F), from uint8 images (B, 3, H, W) to features (B, F).
        reference: file that :class:`~lit_shortcut.tasks.reference.ReferenceTask` wrote with the same ``extractor``.

    Raises:
        WeightsError: if the file is missing or damaged, was made with another extractor, or lacks a needed tensor.
    """

    needed: tuple[str, ...] = ("features",)

    def __init__(self, extractor: nn.Module, reference: Path) -> None:
        super().__init__(extractor)
        self.reference = load_reference(Path(reference), extractor, self.needed)

    def identity(self) -> dict[str, Any]:
        """Return the identity of the metric and a fingerprint of the reference tensors it uses."""
        return super().identity() | {"reference": fingerprint(self.reference)}


class FrechetDistance(ReferenceMetric):
    """Fréchet distance between Gaussians fitted to generated and real features (Heusel et al., arXiv 1706.08500).

    With Inception's 2048 features this is FID. It is biased upwards if images are few. See :class:`ReferenceMetric` for
    the arguments.
    """

    higher_is_better = False
    needed = ("mean", "covariance")

    def compute(self) -> Tensor:
        """Return the distance."""
        features = self.gathered().double()
        generated = {"mu": features.mean(0).numpy(), "sigma": features.T.cov().reshape(features.shape[1], -1).numpy()}
        real = {"mu": self.reference["mean"].numpy(), "sigma": self.reference["covariance"].numpy()}
        found = fid_statistics_to_metric(generated, real, verbose=False)["frechet_inception_distance"]
        return torch.tensor(found, device=self.device)


class KernelDistance(ReferenceMetric):
    """Squared maximum mean discrepancy of features under a cubic kernel, KID (Bińkowski et al., arXiv 1801.01401).

    It is unbiased at any number of images. The value is the mean over random subsets, always the same ones.

    Args:
        extractor: as in :class:`ReferenceMetric`.
        reference: as in :class:`ReferenceMetric`; must hold features.
        subsets: number of subsets.
        subset_size: generated and real images in each; all generated ones where they are fewer.

    Raises:
        WeightsError: as in :class:`ReferenceMetric`.
        ValueError: if ``subset_size`` is below 2 or above the number of reference features, or ``subsets`` is below 1.
    """

    higher_is_better = False

    def __init__(self, extractor: nn.Module, reference: Path, subsets: int = 100, subset_size: int = 1000) -> None:
        super().__init__(extractor, reference)
        require_at_least(1, subsets=subsets)
        require_at_least(2, subset_size=subset_size)
        self.subsets, self.subset_size = subsets, subset_size
        if (found := len(self.reference["features"])) < subset_size:
            raise ValueError(
                f"subset_size must be at most the number of reference features in {reference}, {found}; "
                f"got {subset_size}"
            )

    def identity(self) -> dict[str, Any]:
        """Return the identity of the metric, with the subsets."""
        return super().identity() | {"subsets": self.subsets, "subset_size": self.subset_size}

    def compute(self) -> Tensor:
        """Return the mean over subsets, which a size below ``subset_size`` leaves unbiased."""
        features = self.gathered()
        found = kid_features_to_metric(
            features,
            self.reference["features"],
            kid_subsets=self.subsets,
            kid_subset_size=min(self.subset_size, len(features)),
            verbose=False,
        )
        return torch.tensor(float(found["kernel_inception_distance_mean"]), device=self.device)


class Coverage(ReferenceMetric):
    """Precision or recall by nearest neighbours in features (Kynkäänniemi et al., arXiv 1904.06991).

    Generate about as many images as there are reference features.

    Args:
        extractor: as in :class:`ReferenceMetric`.
        reference: as in :class:`ReferenceMetric`; must hold features.
        neighbours: k; an image's neighbourhood reaches to its k-th nearest neighbour.

    Raises:
        WeightsError: as in :class:`ReferenceMetric`.
        ValueError: if ``neighbours`` is not below the number of reference features, or below 1.
    """

    higher_is_better = True
    key: str

    def __init__(self, extractor: nn.Module, reference: Path, neighbours: int = 3) -> None:
        super().__init__(extractor, reference)
        self.neighbours = neighbours
        self._require(len(self.reference["features"]), f"reference features in {reference}")

    def identity(self) -> dict[str, Any]:
        """Return the identity of the metric, with the number of neighbours."""
        return super().identity() | {"neighbours": self.neighbours}

    def compute(self) -> Tensor:
        """Return the share; raises ValueError unless there are more images than ``neighbours``."""
        features = self.gathered()
        self._require(len(features), "generated images")
        found = prc_features_to_metric(
            features,
            self.reference["features"],
            prc_neighborhood=self.neighbours,
            prc_batch_size=1000,
            save_cpu_ram=True,
            verbose=False,
        )
        return torch.tensor(float(found[self.key]), device=self.device)

    def _require(self, found: int, what: str) -> None:
        if not 1 <= self.neighbours < found:
            raise ValueError(
                f"neighbours must lie in 1..{found - 1}, below the number of {what}; got {self.neighbours}"
            )


class Precision(Coverage):
    """Share of generated images within the neighbourhood of a real one: fidelity; see :class:`Coverage`."""

    key = "precision"


class Recall(Coverage):
    """Share of real images within the neighbourhood of a generated one: diversity; see :class:`Coverage`."""

    key = "recall"


class InceptionScore(FeatureMetric):
    """exp of the mean KL between an image's class probabilities and their mean (Salimans et al., arXiv 1606.03498).

    It needs no reference. The value is the mean over equal parts of the images, always shuffled in the same way.

    Args:
        classifier: network from uint8 images (B, 3, H, W) to class logits (B, classes); for the published score
            ``InceptionFeatures`` with ``feature: logits_unbiased``.
        splits: number of parts.

    Raises:
        ValueError: if ``splits`` is below 1.
    """

    higher_is_better = True

    def __init__(self, classifier: nn.Module, splits: int = 10) -> None:
        super().__init__(classifier)
        require_at_least(1, splits=splits)
        self.splits = splits

    def identity(self) -> dict[str, Any]:
        """Return the identity of the metric, with the number of parts."""
        return super().identity() | {"splits": self.splits}

    def compute(self) -> Tensor:
        """Return the score; raises ValueError if there are fewer images than ``splits``."""
        features = self.gathered()
        if len(features) < self.splits:
            raise ValueError(f"splits must be at most the number of images, {len(features)}; got {self.splits}")
        found = isc_features_to_metric(features, self.splits)["inception_score_mean"]
        return torch.tensor(found, device=self.device)
