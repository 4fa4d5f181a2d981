"""Measures of generated images: what they share, and those that look at one image at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from lit_shortcut.contracts import Conditions
from lit_shortcut.weights import fingerprint


class FrozenNetwork:
    """A network that a metric asks, outside its module tree: no checkpoint or average of weights takes it in.

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
        """Return what the network makes of ``images``, in its own precision whatever that of the trainer."""
        with torch.autocast(images.device.type, enabled=False):
            output: Tensor = self.module(images)
        return output

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Class, ``hparams`` and a fingerprint of the weights."""
        facts = {"class": type(self.module).__name__, "weights": fingerprint(self.module.state_dict())}
        hparams = getattr(self.module, "hparams", None)
        return facts if hparams is None else facts | {"hparams": hparams}


class ImageMetric(Metric):
    """Gathers images batch by batch; ``compute`` is called on all ranks and counts the images of all of them.

    Subclasses set ``higher_is_better``, implement ``update(images, conditions)`` and ``compute()``, a scalar, and keep
    networks as :class:`FrozenNetwork`. What is no state, such as reference statistics, is never reduced over ranks.
    """

    is_differentiable = False
    full_state_update = False

    def update(self, images: Tensor, conditions: Conditions) -> None:
        """Take in uint8 ``images`` (B, 3, H, W), made for ``conditions``."""
        raise NotImplementedError

    def compute(self) -> Tensor:
        """Return the measure, a scalar, of all images since the last reset."""
        raise NotImplementedError

    def identity(self) -> dict[str, Any]:
        """Everything the value depends on besides the images: class, networks, and arguments that subclasses add."""
        networks = {name: part.identity for name, part in vars(self).items() if isinstance(part, FrozenNetwork)}
        return {"class": type(self).__name__} | networks

    def gathers(self) -> object:
        """Key of the states: metrics of equal keys gather the same, so that one ``update`` serves all of them."""
        return id(self)

    def _apply(self, fn: Callable[..., Any], exclude_state: Sequence[str] = "") -> nn.Module:
        """Move the networks along with the states; their precision stays."""
        moved = super()._apply(fn, exclude_state)
        for part in vars(self).values():
            if isinstance(part, FrozenNetwork):
                part.module.to(self.device)
        return moved


def collection(metrics: dict[str, ImageMetric]) -> MetricCollection:
    """Put ``metrics`` into one collection, in which those that gather the same run their network once.

    torchmetrics would find such groups by comparing states after the first batch, and take two metrics for one whose
    first values happen to be equal.
    """
    groups: dict[object, list[str]] = defaultdict(list)
    for name, metric in metrics.items():
        groups[metric.gathers()].append(name)
    return MetricCollection(dict(metrics), compute_groups=list(groups.values()))


def prompts_of(conditions: Conditions) -> tuple[str, ...]:
    """Return the prompts of ``conditions``, for a metric that compares images with them.

    Raises:
        ValueError: if there is not one for each image.
    """
    if len(conditions.prompts) != len(conditions.ids):
        raise ValueError(
            f"expected a prompt for each of {len(conditions.ids)} images, got {len(conditions.prompts)}; "
            "datamodules.prompts.Prompts makes such conditions"
        )
    return conditions.prompts


class ImageMean(ImageMetric):
    """A measure whose value is a mean over images, or over what is asked of them."""

    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def add(self, values: Tensor) -> None:
        """Take in ``values`` of any shape."""
        self.total = self.total + values.detach().float().sum().to(self.device)
        self.count = self.count + values.numel()

    def compute(self) -> Tensor:
        """Return the mean; NaN where nothing was taken in."""
        return self.total / self.count


class ClassAgreement(ImageMean):
    """Share of images that a classifier takes for the class they were made for.

    Args:
        classifier: network from uint8 images (B, 3, H, W) to logits (B, classes).
    """

    higher_is_better = True

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = FrozenNetwork(classifier)

    def update(self, images: Tensor, conditions: Conditions) -> None:
        """Take in uint8 ``images`` (B, 3, H, W), made for the classes ``conditions.labels``."""
        self.add(self.classifier(images).argmax(-1) == conditions.labels)
