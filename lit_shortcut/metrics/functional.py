"""Measures of predicted features and logits, and the confidence interval of a mean over seeds.

Features (..., S, C) are compared at the places still masked among their first L rows, the image tokens. A mean runs
over all masked places of the batch, so a sample's weight is its number of masked places; it is 0 if there are none.
"""

from __future__ import annotations

import math
import statistics

import torch
from scipy.special import stdtrit  # quantiles of Student's t
from torch import Tensor
from torch.nn import functional as F


def masked_mean(values: Tensor, is_masked: Tensor) -> Tensor:
    """Return the mean, a scalar, of ``values`` (..., L) where ``is_masked`` (..., L); 0 if nothing is masked.

    >>> masked_mean(torch.tensor([[1.0, 2.0, 6.0]]), torch.tensor([[True, False, True]]))
    tensor(3.5000)
    """
    return values.masked_fill(~is_masked, 0).sum() / is_masked.sum().clamp(min=1)


def masked_mse(prediction: Tensor, target: Tensor, is_masked: Tensor) -> Tensor:
    """Return the squared error, a scalar, of ``prediction`` (..., S, C), mean over channels and masked places.

    >>> target = torch.tensor([[[0.0, 0.0], [5.0, 5.0], [9.0, 9.0]]])  # L = 2 image tokens, one row of the base's own
    >>> masked_mse(torch.zeros(1, 3, 2), target, torch.tensor([[False, True]]))
    tensor(25.)
    """
    difference = _image_rows(prediction, is_masked) - _image_rows(target, is_masked)
    return masked_mean(difference.square().mean(-1), is_masked)


def masked_cosine(a: Tensor, b: Tensor, is_masked: Tensor) -> Tensor:
    """Return the cosine similarity, a scalar, of features ``a`` and ``b`` (..., S, C), mean over masked places.

    >>> a, b = torch.tensor([[[3.0, 4.0], [1.0, 0.0]]]), torch.tensor([[[4.0, 3.0], [0.0, 1.0]]])
    >>> masked_cosine(a, b, torch.tensor([[True, False]]))
    tensor(0.9600)
    """
    return masked_mean(F.cosine_similarity(_image_rows(a, is_masked), _image_rows(b, is_masked), dim=-1), is_masked)


def centred_cosine(a: Tensor, b: Tensor, is_masked: Tensor, centre: Tensor) -> Tensor:
    """Return the :func:`masked_cosine` of ``a`` and ``b`` (..., S, C) less ``centre`` (..., 1, C), such as a mean.

    Features share a large constant part, which brings the plain cosine close to 1.

    >>> a, b = torch.tensor([[[11.0, 0.0]]]), torch.tensor([[[9.0, 0.0]]])
    >>> masked = torch.tensor([[True]])
    >>> masked_cosine(a, b, masked), centred_cosine(a, b, masked, torch.tensor([[10.0, 0.0]]))
    (tensor(1.), tensor(-1.))
    """
    return masked_cosine(a - centre, b - centre, is_masked)


def gain_over_hold(error: Tensor, hold_error: Tensor) -> Tensor:
    """Return the share of hold's error that a predictor removes: 1 is perfect, 0 no better than hold.

    >>> gain_over_hold(torch.tensor(0.5), torch.tensor(2.0))
    tensor(0.7500)
    """
    return 1 - error / hold_error


def head_kl(target_logits: Tensor, logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Return KL(target ‖ prediction) in nats, (..., L), between softmaxes of logits (..., L, V) at ``temperature``.

    The factor temperature² keeps gradients of one size at every temperature (Hinton et al., arXiv 1503.02531).

    >>> head_kl(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, math.log(3)]]))  # ½ log(4/3)
    tensor([0.1438])
    """
    log_target = _at_least_single(target_logits).div(temperature).log_softmax(-1)
    log_prediction = _at_least_single(logits).div(temperature).log_softmax(-1)
    divergence = F.kl_div(log_prediction, log_target, reduction="none", log_target=True).sum(-1)
    return divergence * temperature**2


def token_agreement(logits: Tensor, target_logits: Tensor, is_masked: Tensor) -> Tensor:
    """Return the share, a scalar, of masked places where logits (..., L, V) and targets agree on the top code.

    >>> logits = torch.eye(3)[None]
    >>> token_agreement(logits, logits.flip(1), torch.tensor([[True, True, False]]))
    tensor(0.5000)
    """
    return masked_mean((logits.argmax(-1) == target_logits.argmax(-1)).float(), is_masked)


def mean_interval(values: list[float]) -> tuple[float, float]:
    """Return the mean of independent ``values``, one per seed, and half its 95 % confidence interval (Student's t).

    The interval of a single value is NaN.

    >>> mean, half_width = mean_interval([1.0, 2.0, 3.0])
    >>> f"{mean} ± {half_width:.3f}"
    '2.0 ± 2.484'

    Raises:
        ValueError: if there is no value.
    """
    mean = statistics.fmean(values)
    if len(values) == 1:
        return mean, math.nan
    return mean, float(stdtrit(len(values) - 1, 0.975)) * statistics.stdev(values) / math.sqrt(len(values))


def _image_rows(features: Tensor, is_masked: Tensor) -> Tensor:
    return _at_least_single(features[..., : is_masked.shape[-1], :])


def _at_least_single(x: Tensor) -> Tensor:
    """Cast half precision to float32: squares of features overflow float16."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
