"""Sampling of a code at each masked place."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Choice(NamedTuple):
    """Codes (B, M) drawn at the masked places, and their log-probabilities (B, M)."""

    codes: Tensor
    log_probs: Tensor


def sample_codes(logits: Tensor, uniforms: Tensor | None) -> Choice:
    """Draw from softmax(``logits`` (B, M, V)) by inverting its cumulative distribution at ``uniforms`` (B, M).

    This takes one uniform value per place where Gumbel noise would take V. None takes the most probable code.

    >>> sample_codes(torch.tensor([[[0.0, 0.0]]]), torch.tensor([[0.75]])).codes
    tensor([[1]])
    """
    log_probs = logits.float().log_softmax(dim=-1)
    if uniforms is None:
        codes = log_probs.argmax(dim=-1)
    else:
        # below exp(-87) float32 has only denormals, too small to be drawn and slow on CPUs
        cumulative = _cumulative(log_probs.clamp(min=-87).exp_())
        # scaled by the total, which rounding leaves just off 1, so that no code without mass is drawn
        codes = torch.searchsorted(cumulative, (uniforms * cumulative[..., -1])[..., None]).squeeze(-1)
        codes = codes.clamp(max=logits.shape[-1] - 1)
    return _chosen(codes, log_probs)


def largest_codes(logits: Tensor, noise: Tensor) -> Choice:
    """Take the codes of the largest sums of ``logits`` and ``noise`` (B, M, V), both in the dtype of the noise.

    With Gumbel noise this draws from softmax(``logits``), as exactly as the dtype allows.
    """
    log_probs = logits.float().log_softmax(dim=-1)
    codes = (logits.to(noise.dtype) + noise).argmax(dim=-1)
    return _chosen(codes, log_probs)


def _chosen(codes: Tensor, log_probs: Tensor) -> Choice:
    return Choice(codes, log_probs.gather(-1, codes[..., None]).squeeze(-1))


def _cumulative(probabilities: Tensor) -> Tensor:
    """Return the running sums (B, M, V) of ``probabilities``.

    Float cumsum has no deterministic kernel on CUDA; integer sums are exact in any order.
    """
    if probabilities.is_cuda and torch.are_deterministic_algorithms_enabled():
        return exact_cumulative(probabilities)
    return probabilities.cumsum(dim=-1)


def exact_cumulative(probabilities: Tensor) -> Tensor:
    """Return the running sums, float32 (B, M, V) in units of 2^-46, of ``probabilities`` rounded to such units.

    >>> exact_cumulative(torch.tensor([0.25, 0.75])) * 2.0**-46
    tensor([0.2500, 1.0000])
    """
    return (probabilities * 2.0**46).long().cumsum(dim=-1).float()
