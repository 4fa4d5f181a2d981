"""Base classes of image metrics, and the metrics that judge one image at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from lit_shortcut.contracts import Conditions
from lit_shortcut.precision import float32_by_default
from lit_shortcut.weights import fingerprint


class FrozenNetwork:
    """A metric's network, kept out of its module tree, and so out of checkpoints and averages of weights.

    Copies of the metric share it.

    Args:
        network: put into eval mode and frozen; ``hparams``, if it has them, belong to its identity.
    """

    def __init__(self, network: nn.Module) -> None:
        self.module = network.eval().requires_grad_(False)

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenNetwork:
        return self

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Run the network on ``images`` in its own precision, without autocast."""
        with torch.autocast(images.device.type, enabled=False):
            output: Tensor = self.module(images)
        return output

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Return the class, ``hparams`` and a fingerprint of the weights."""
        facts = {"class": type(self.module).__name__, "weights": fingerprint(self.module.state_dict())}
        hparams = getattr(self.module, "hparams", None)
        return facts if hparams is None else facts | {"hparams": hparams}


class ImageMetric(Metric):
    """Metric of generated images; ``compute`` is called on all ranks and covers the images of all of them.

    Subclasses set ``higher_is_better``, implement ``update(images, conditions)`` and ``compute()``, a scalar, and keep
    networks as :class:`FrozenNetwork`. Only states are reduced over ranks, not reference statistics. Values have the
    precision of float32 in a trainer of any precision.
    """

    is_differentiable = False
    full_state_update = False

    def update(self, images: Tensor, conditions: Conditions) -> None:
        """Add uint8 ``images`` (B, 3, H, W), made for ``conditions``."""
        raise NotImplementedError

    def compute(self) -> Tensor:
        """Return the value, a scalar, for all images since the last reset."""
        raise NotImplementedError

    def identity(self) -> dict[str, Any]:
        """Return all that the value depends on but the images: class, networks, and arguments that subclasses add."""
        networks = {name: part.identity for name, part in vars(self).items() if isinstance(part, FrozenNetwork)}
        return {"class": type(self).__name__} | networks

    def _wrap_update(self, update: Callable[..., Any]) -> Callable[..., Any]:
        wrapped: Callable[..., Any] = super()._wrap_update(float32_by_default()(update))
        return wrapped

    def _wrap_compute(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        wrapped: Callable[..., Any] = super()._wrap_compute(float32_by_default()(compute))
        return wrapped

    def gathers(self) -> object:
        """Return a key shared by metrics with equal states, which one ``update`` serves."""
        return id(self)

    def _apply(self, fn: Callable[..., Any], exclude_state: Sequence[str] = "") -> nn.Module:
        """Move the networks along with the states, without changing their precision."""
        moved = super()._apply(fn, exclude_state)
        for part in vars(self).values():
            if isinstance(part, FrozenNetwork):
                part.module.to(self.device)
        return moved


def collection(metrics: dict[str, ImageMetric]) -> MetricCollection:
    """Put ``metrics`` into one collection, in which metrics with equal states run their network once.

    torchmetrics finds such groups by comparing states after the first batch, and would group two metrics whose first
    values happen to be equal.
    """
    groups: dict[object, list[str]] = defaultdict(list)
    for name, metric in metrics.items():
        groups[metric.gathers()].append(name)
    return MetricCollection(dict(metrics), compute_groups=list(groups.values()))


class ImageMean(ImageMetric):
    """Metric whose value is a mean over images, or over requirements on them."""

    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def add(self, values: Tensor) -> None:
        """Add ``values`` of any shape."""
        self.total = self.total + values.detach().float().sum().to(self.device)
        self.count = self.count + values.numel()

    def compute(self) -> Tensor:
        """Return the mean; NaN if there are no values."""
        return self.total / self.count


class ClassAgreement(ImageMean):
    """Share of images that a classifier assigns to the class they were made for.

    Args:
        classifier: network from uint8 images (B, 3, H, W) to logits (B, classes).
    """

    higher_is_better = True

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = FrozenNetwork(classifier)

    def update(self, images: Tensor, conditions: Conditions) -> None:
        """Add uint8 ``images`` (B, 3, H, W), made for the classes ``conditions.labels``."""
        self.add(self.classifier(images).argmax(-1) == conditions.labels)
