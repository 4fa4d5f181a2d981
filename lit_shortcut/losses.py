"""Losses of a shortcut network, by name in YAML: each compares predicted features with recorded ones."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal, get_args

import torch
from torch import Tensor

from lit_shortcut.bounds import require_above
from lit_shortcut.interface import TokenInterface
from lit_shortcut.metrics.functional import head_kl, masked_mse

LossRows = Literal["masked", "all"]
Places = Literal["masked", "all", "tokens"]


class Loss(ABC):
    """A mean over rows of the features, and its weight in the total loss.

    Args:
        weight: weight in the sum of all losses.
        places: what counts: image rows of tokens still ``masked``, ``all`` rows that are not padding, or the masked
            ``tokens`` themselves, which are as many as their rows in most bases.

    Raises:
        ValueError: if the weight is not positive or ``places`` is unknown.
    """

    def __init__(self, weight: float = 1.0, places: Places = "masked") -> None:
        require_above(0, weight=weight)  # a loss is left out by its absence
        if places not in get_args(Places):
            raise ValueError(f"places must be one of {', '.join(get_args(Places))}; got {places!r}")
        self.weight, self.places = weight, places

    @abstractmethod
    def __call__(self, prediction: Tensor, target: Tensor, where: Tensor, interface: TokenInterface) -> Tensor:
        """Return the mean, a scalar, over the places that count.

        Args:
            prediction: features (B, S, C).
            target: recorded features (B, S, C).
            where: places that count: a mask of the first rows, or, for ``tokens``, their samples and image places,
                (2, n), as :func:`masked_tokens` returns them.
            interface: interface of the base.
        """


class MaskedMSE(Loss):
    """Mean squared error of the features, the published loss (arXiv 2602.23996, section 3).

    Args:
        weight: in the sum of all losses.
        rows: ``masked`` as published for MaskGIT, ``all`` as for DiMOO.

    Raises:
        ValueError: if the weight is not positive or ``rows`` is unknown.
    """

    def __init__(self, weight: float = 1.0, rows: LossRows = "masked") -> None:
        if rows not in get_args(LossRows):
            raise ValueError(f"rows must be one of {', '.join(get_args(LossRows))}; got {rows!r}")
        super().__init__(weight, rows)

    def __call__(self, prediction: Tensor, target: Tensor, where: Tensor, interface: TokenInterface) -> Tensor:
        """Return the mean over channels and rows."""
        return masked_mse(prediction, target, where)


class HeadKL(Loss):
    """T²·KL(head(target)/T ‖ head(prediction)/T) in nats, at image tokens still masked.

    This project's addition: after training on the squared error only, the head is more certain on predicted features
    than on the base's, and images vary less.

    Args:
        weight: in the sum of all losses.
        temperature: T.

    Raises:
        ValueError: if the temperature is not positive.
    """

    def __init__(self, weight: float = 1.0, temperature: float = 1.0) -> None:
        super().__init__(weight, "tokens")
        require_above(0, temperature=temperature)
        self.temperature = temperature

    def __call__(self, prediction: Tensor, target: Tensor, where: Tensor, interface: TokenInterface) -> Tensor:
        """Return the mean over places; the head runs only there."""
        samples, places = where
        rows = interface.rows_of(places)
        wanted, found = (
            interface.row_logits(features[samples, rows], places)
            for features in (target.to(prediction.dtype), prediction)
        )
        return head_kl(wanted, found, self.temperature).sum() / max(1, len(places))


def masked_tokens(is_masked: Tensor, count: int | None) -> Tensor:
    """Return samples and image places (2, n) of the tokens where ``is_masked`` (B, L).

    Args:
        is_masked: (B, L).
        count: n, where it is known on the host; None counts on the device, and waits for it.

    >>> masked_tokens(torch.tensor([[False, True, True], [True, False, False]]), 3)
    tensor([[0, 0, 1],
            [1, 2, 0]])
    """
    if count is None:
        return is_masked.nonzero().T
    places = is_masked.flatten().byte().argsort(descending=True, stable=True)[:count]
    return torch.stack([places // is_masked.shape[1], places % is_masked.shape[1]])


def weighted_sum(losses: dict[str, Loss], terms: dict[str, Tensor]) -> Tensor:
    """Return the sum of ``terms`` by the weights of ``losses``."""
    return torch.stack([losses[name].weight * term for name, term in terms.items()]).sum()
