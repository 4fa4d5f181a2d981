"""Uniform noise that belongs to a sample: the same for its seed in any batch, on any rank and device."""

from __future__ import annotations

import torch
from torch import Tensor

# Constants of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014) as int64.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_FIRST = 0xBF58476D1CE4E5B9 - 2**64
_SECOND = 0x94D049BB133111EB - 2**64
# Constants of a 32-bit hash with little bias (Wellons: hash-prospector, 2018), and 2³² over the golden ratio, as int32.
_FIRST_32, _SECOND_32, _GOLDEN_32 = 0x21F0AAAD, 0xD35A2D97 - 2**32, 0x9E3779B9 - 2**32
_TINY = 1e-20  # keeps the logarithms finite
_BITS = 23  # with one half added, 24 significant bits: exact in float32, never 0 or 1


def uniform(seeds: Tensor, streams: Tensor | int, positions: Tensor) -> Tensor:
    """Draw uniform values in (0, 1), float32 (…, B, M), for ``seeds`` (B,) and ``positions`` (B, M) or (M,).

    A counter-based generator: each value depends only on seed, stream and position. ``streams``, a number or (…),
    separate draws at the same position (each step of the decoding loop has its own).

    >>> single = uniform(torch.tensor([7]), 0, torch.tensor([[0, 1, 2]]))
    >>> batch = uniform(torch.tensor([3, 7]), 0, torch.tensor([[0, 1, 2], [2, 1, 0]]))
    >>> torch.equal(single[0], batch[1].flip(0))
    True
    """
    bits = _bits(seeds, streams, positions)
    top = _logical_shift(bits, 64 - _BITS)
    return (top.float() + 0.5) * 2.0**-_BITS


def uniform_by_code(seeds: Tensor, stream: int, places: Tensor, codebook_size: int) -> Tensor:
    """Draw a uniform value in (0, 1) for each code at ``places`` (B, M), float32 (B, M, V), for ``seeds`` (B,).

    As in :func:`uniform`, each depends only on seed, stream, place and code. Since there are so many, only what is
    common to a place is hashed in 64 bits; what follows is 32 bits wide and in place.
    """
    first, second = _bits(seeds, stream, places)[..., None].view(torch.int32).split(1, dim=-1)
    codes = torch.arange(codebook_size, dtype=torch.int32, device=places.device)
    bits = first + codes * _GOLDEN_32
    bits.bitwise_xor_((bits >> 16).bitwise_and_(2**16 - 1)).mul_(_FIRST_32)
    bits.bitwise_xor_(second)  # places whose first halves are near one another part here
    bits.bitwise_xor_((bits >> 15).bitwise_and_(2**17 - 1)).mul_(_SECOND_32)
    bits.bitwise_xor_((bits >> 15).bitwise_and_(2**17 - 1))
    top = (bits >> (32 - _BITS)).bitwise_and_(2**_BITS - 1)
    return top.float().add_(0.5).mul_(2.0**-_BITS)


def gumbel(uniforms: Tensor) -> Tensor:
    """Return standard Gumbel noise −log(−log u) from ``uniforms`` u in (0, 1)."""
    return -(-uniforms.log()).log()


def bfloat16_gumbel(uniforms: Tensor) -> Tensor:
    """Return Gumbel noise as it comes from ``uniforms`` in bfloat16: between −3.9 and 5.6, in steps.

    The greatest bfloat16 below 1 is 255/256, and what is rounded to 1 becomes 0, as CUDA's generator has it.
    """
    rounded = uniforms.bfloat16()
    rounded = torch.where(rounded == 1, 0, rounded)
    return -(-(rounded + _TINY).log() + _TINY).log()


def _bits(seeds: Tensor, streams: Tensor | int, positions: Tensor) -> Tensor:
    """Return 64 bits, int64 (…, B, M), for each seed, stream and position."""
    if not isinstance(streams, Tensor):
        streams = torch.full((), streams, device=seeds.device)
    key = _mix(_mix(seeds) + (streams[..., None] + 1) * _GOLDEN)
    return _mix(key[..., None] + (positions + 1) * _GOLDEN)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _logical_shift(x, 30)) * _FIRST
    x = (x ^ _logical_shift(x, 27)) * _SECOND
    return x ^ _logical_shift(x, 31)


def _logical_shift(x: Tensor, bits: int) -> Tensor:
    """Shift right, filling with zeros; torch's shift of int64 fills with the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
