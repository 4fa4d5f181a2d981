"""Image decoder of Show-o's MAGVIT-v2 (showlab/magvitv2), for the codes of MMaDA.

No table is looked up: each code is the bits of its number as ±1 (LFQ; Yu et al., arXiv 2310.05737, section 3.1).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_shortcut.bases.code_decoder import CodeDecoder, taming_pairs
from lit_shortcut.published import Names, filled, load_state
from lit_shortcut.weights import WeightsError

FILES = ("pytorch_model.safetensors", "model.safetensors", "diffusion_pytorch_model.safetensors", "pytorch_model.bin")
"""Possible names of the weight file; the first that exists is used."""

_UNUSED = ("encoder.", "quant_conv.", "quantize.power_vals")  # other tensors of the checkpoint
_SIZES: dict[str, Any] = {"width": 128, "multipliers": (1, 1, 2, 2, 4), "num_blocks": (4, 4, 3, 4, 3)}


def magvit_decoder(bits: int = 13, **sizes: Any) -> CodeDecoder:
    """MAGVIT-v2's f16 decoder with random weights; ``sizes`` change arguments of :class:`CodeDecoder`."""
    decoder = CodeDecoder(2**bits, bits, bits, **_SIZES | sizes, is_rounded=False)
    if not decoder.codes.weight.is_meta:
        decoder.codes.weight.copy_(bits_of_codes(bits))
    return decoder


def load_magvit(folder: Path, bits: int = 13, **sizes: Any) -> CodeDecoder:
    """Load MAGVIT-v2's frozen decoder with the published weights in ``folder``.

    Args:
        folder: folder of one of :data:`FILES`.
        bits: bits of a code.
        **sizes: arguments of :class:`CodeDecoder` that differ from the published f16 decoder's.

    Raises:
        WeightsError: if the file is missing, damaged, or not of these sizes, or its codes are not their bits.
    """
    path = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if path is None:
        raise WeightsError(f"{folder}: no weights; expected one of {', '.join(FILES)}")
    pairs = [("decoder.post_quant_conv.", "post_quant_conv."), ("quantize.embedding", "codes.weight")]
    num_levels = len(sizes.get("multipliers", _SIZES["multipliers"]))
    names = Names(pairs + taming_pairs(num_levels))
    decoder = filled(lambda: magvit_decoder(bits, **sizes), load_state(path), names, path, _UNUSED)
    if not torch.equal(decoder.codes.weight, bits_of_codes(bits)):
        raise WeightsError(f"{path}: quantize.embedding: expected the bits of each code as -1 and 1, highest first")
    return decoder


def bits_of_codes(bits: int) -> Tensor:
    """Codes 0, 1, … as their bits, highest first, −1 for a bit that is not set: (2^``bits``, ``bits``).

    >>> bits_of_codes(2).tolist()
    [[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]]
    """
    is_set = torch.arange(2**bits)[:, None] >> torch.arange(bits - 1, -1, -1) & 1
    return is_set * 2.0 - 1
