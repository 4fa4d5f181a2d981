"""Measures of generated images. None is a module, so none enters a checkpoint or an average of weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
from torchmetrics.image.fid import FrechetInceptionDistance

from lit_shortcut.contracts import Conditions
from lit_shortcut.networks.classifier import FashionCNN
from lit_shortcut.weights import WeightsError, fingerprint, load_tensors, network_fingerprint, save_tensors


class ImageMetric(Protocol):
    """Gathers images batch by batch; ``compute`` is called on all ranks and counts the images of all of them."""

    higher_is_better: bool

    def identity(self) -> dict[str, Any]:
        """Return JSON values that the measure depends on besides the images: class, weights, reference."""

    def update(self, images: Tensor, conditions: Conditions) -> None:
        """Take in uint8 ``images`` (B, 3, H, W), made for ``conditions``."""

    def compute(self) -> Tensor:
        """The measure, a scalar, of all images since the last reset."""

    def reset(self) -> None:
        """Forget the images."""

    def to(self, device: torch.device) -> None:
        """Move networks and statistics to ``device``."""


def prompts_of(conditions: Conditions) -> tuple[str, ...]:
    """The prompts of ``conditions``, for a metric that compares images with them.

    Raises:
        ValueError: if there is not one for each image.
    """
    if len(conditions.prompts) != len(conditions.ids):
        raise ValueError(
            f"expected a prompt for each of {len(conditions.ids)} images, got {len(conditions.prompts)}; "
            "datamodules.prompts.Prompts makes such conditions"
        )
    return conditions.prompts


def _identity(metric: object) -> dict[str, Any]:
    networks = {name: part for name, part in vars(metric).items() if isinstance(part, nn.Module)}
    return {"class": type(metric).__name__} | {name: network_fingerprint(part) for name, part in networks.items()}


class FrechetDistance:
    """Fréchet distance between features of generated images and reference statistics (Heusel et al., arXiv 1706.08500).

    With :class:`~lit_shortcut.metrics.inception.InceptionFeatures` this is FID; with others it takes their name and is
    not comparable. It depends on the number of images, too: compare at equal numbers alone.

    Args:
        extractor: frozen network with ``num_features`` (F), from uint8 images (B, 3, H, W) to features (B, F).
        reference: file that :class:`FeatureStatistics` made with the same ``extractor``.

    Raises:
        WeightsError: if the file is missing or damaged, or was made with another extractor.
    """

    higher_is_better = False

    def __init__(self, extractor: nn.Module, reference: Path) -> None:
        self.extractor = _frozen(extractor)
        if not reference.is_file():
            raise WeightsError(
                f"{reference}: no such file of reference statistics; `lightning predict` with "
                "lit_shortcut.tasks.reference.ReferenceTask makes it, for ImageNet by configs/maskgit/reference.yaml"
            )
        tensors, metadata = load_tensors(reference)
        own = fingerprint(self.extractor.state_dict())
        if metadata.get("extractor") != own or len(tensors["mean"]) != extractor.num_features:
            raise WeightsError(
                f"{reference}: expected statistics of extractor {own} with {extractor.num_features} features, "
                f"found {metadata.get('extractor')}; FeatureStatistics makes them"
            )
        self.distance = _DistanceToReference(tensors["mean"], tensors["covariance"], metadata["num_images"])
        self.reference = fingerprint(tensors)

    def identity(self) -> dict[str, Any]:
        """Return class, extractor and reference."""
        return _identity(self) | {"reference": self.reference}

    @torch.inference_mode()
    def update(self, images: Tensor, conditions: Conditions) -> None:
        """Take in uint8 ``images`` (B, 3, H, W)."""
        features = _run(self.extractor, images)
        self.distance.update(features.to(self.distance.device).double(), real=False)

    def compute(self) -> Tensor:
        """The distance; raises ValueError if there are fewer than 2 images on all ranks together."""
        distance: Tensor = self.distance.compute()
        return distance.float()

    def reset(self) -> None:
        """Forget the images, not the reference."""
        self.distance.reset()

    def to(self, device: torch.device) -> None:
        """Move the extractor to ``device``, and the statistics unless it lacks double precision."""
        self.extractor.to(device)
        self.distance.to("cpu" if device.type == "mps" else device)


class ImageMean:
    """What measures of images share whose value is a mean over them.

    Args:
        gathered: gathers it; a plain mean by default.
    """

    higher_is_better = True

    def __init__(self, gathered: Metric | None = None) -> None:
        self.gathered = MeanMetric() if gathered is None else gathered

    def identity(self) -> dict[str, Any]:
        """Return class and networks."""
        return _identity(self)

    def compute(self) -> Tensor:
        """The mean."""
        mean: Tensor = self.gathered.compute()
        return mean

    def reset(self) -> None:
        """Forget the images."""
        self.gathered.reset()

    def to(self, device: torch.device) -> None:
        """Move what is gathered to ``device``."""
        self.gathered.to(device)


class ClassAgreement(ImageMean):
    """Share of images that a classifier takes for the class they were made for.

    Args:
        classifier: frozen network from uint8 images (B, 3, H, W) to logits (B, classes).
    """

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = _frozen(classifier)

    @torch.inference_mode()
    def update(self, images: Tensor, conditions: Conditions) -> None:
        """Take in uint8 ``images`` (B, 3, H, W), made for the classes ``conditions.labels``."""
        self.gathered.update((_run(self.classifier, images).argmax(-1) == conditions.labels).float())

    def to(self, device: torch.device) -> None:
        """Move the classifier and its counts to ``device``."""
        super().to(device)
        self.classifier.to(device)


class FashionFeatures(nn.Module):
    """Pooled features of a :class:`~lit_shortcut.networks.classifier.FashionCNN`, an extractor for grey images.

    Args:
        classifier: whose features to take.
    """

    def __init__(self, classifier: FashionCNN) -> None:
        super().__init__()
        self.classifier, self.num_features = classifier, classifier.num_features

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, num_features) of uint8 ``images`` (B, 1 or 3, H, W)."""
        return self.classifier.features(images)

    @classmethod
    def load(cls, path: Path) -> FashionFeatures:
        """Features of the classifier at ``path``; raises :class:`~lit_shortcut.weights.WeightsError` if it is none."""
        return cls(FashionCNN.load(path))


class FeatureStatistics:
    """Mean and covariance of the features of images, gathered batch by batch in double precision.

    Args:
        extractor: from uint8 images (B, 1 or 3, H, W) to features (B, F); put into eval mode and frozen.
    """

    def __init__(self, extractor: nn.Module) -> None:
        self.extractor, self.count = _frozen(extractor), 0
        self.total = self.products = torch.zeros((), dtype=torch.float64)

    def update(self, images: Tensor) -> None:
        """Take in uint8 ``images`` (B, 1 or 3, H, W) on the extractor's device."""
        features = _run(self.extractor, images).cpu().double()
        self.count += len(features)
        self.total, self.products = self.total + features.sum(0), self.products + features.T @ features

    def save(self, path: Path, images: str) -> None:
        """Write the reference file of :class:`FrechetDistance`; ``images`` says which images they are.

        Raises:
            ValueError: if there are fewer than 2 images.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs 2 images or more, got {self.count}")
        mean = self.total / self.count
        covariance = (self.products - self.count * mean.outer(mean)) / (self.count - 1)
        metadata = {"extractor": fingerprint(self.extractor.state_dict()), "num_images": self.count, "images": images}
        save_tensors(path, {"mean": mean, "covariance": covariance}, metadata)


class _DistanceToReference(FrechetInceptionDistance):
    """torchmetrics' distance of features (B, F), float64, from a reference that is no state of its own.

    As a state the reference would be summed over ranks.
    """

    def __init__(self, mean: Tensor, covariance: Tensor, num_images: int) -> None:
        super().__init__(feature=_Features(len(mean)))
        self.orig_dtype = torch.float64  # set by update otherwise, which a rank without images never calls
        self.reference_sum = num_images * mean
        self.reference_products = (num_images - 1) * covariance + num_images * mean.outer(mean)
        self.reference_count = torch.tensor(num_images)

    def compute(self) -> Tensor:
        """The distance; torchmetrics has summed the states over ranks before."""
        if self.fake_features_num_samples < 2:
            raise ValueError(f"a Fréchet distance needs 2 images or more, got {int(self.fake_features_num_samples)}")
        self.real_features_sum = self.reference_sum.to(self.device)
        self.real_features_cov_sum = self.reference_products.to(self.device)
        self.real_features_num_samples = self.reference_count.to(self.device)
        return super().compute()


class _Features(nn.Module):
    """Features in, features out."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def _frozen(network: nn.Module) -> nn.Module:
    return network.eval().requires_grad_(False)


@torch.inference_mode()
def _run(network: nn.Module, images: Tensor) -> Tensor:
    """What ``network`` makes of ``images``, in its own precision whatever that of the trainer."""
    with torch.autocast(images.device.type, enabled=False):
        output: Tensor = network(images)
    return output
