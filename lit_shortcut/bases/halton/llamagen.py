"""Image decoder of LlamaGen (Sun et al., arXiv 2406.06525), for the codes of Halton-MaskGIT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lit_shortcut.bases.code_decoder import CodeDecoder, attention_pairs
from lit_shortcut.published import Names, filled, load_state

NAMES = Names(
    [
        ("quantize.embedding.", "codes."),
        ("decoder.conv_blocks.#.res.#.nin_shortcut.", "decoder.up_blocks.#.resnets.#.conv_shortcut."),
        ("decoder.conv_blocks.#.res.#.", "decoder.up_blocks.#.resnets.#."),
        *attention_pairs("decoder.conv_blocks.#.attn.#.", "decoder.up_blocks.#.attentions.#."),
        ("decoder.conv_blocks.#.upsample.", "decoder.up_blocks.#.upsamplers.0."),
        ("decoder.mid.0.", "decoder.mid_block.resnets.0."),
        ("decoder.mid.2.", "decoder.mid_block.resnets.1."),
        *attention_pairs("decoder.mid.1.", "decoder.mid_block.attentions.0."),
        ("decoder.norm_out.", "decoder.conv_norm_out."),
    ]
)
"""Names of tensors in the published checkpoint and ours; other names are the same."""

_UNUSED = ("encoder.", "quant_conv.", "quantize.codebook_used")  # other tensors of the checkpoint
_SIZES: dict[str, Any] = {
    "codebook_size": 16384,
    "code_width": 8,
    "latent_width": 256,
    "multipliers": (1, 1, 2, 2, 4),
}


def llamagen_decoder(**sizes: Any) -> CodeDecoder:
    """LlamaGen's f16 decoder with random weights; ``sizes`` change arguments of :class:`CodeDecoder`.

    The coarsest level has self-attention, and codes have unit length.
    """
    sizes = _SIZES | sizes
    return CodeDecoder(**sizes, attention_levels=(len(sizes["multipliers"]) - 1,), is_normalised=True)


def load_llamagen(path: Path, **sizes: Any) -> CodeDecoder:
    """Load LlamaGen's frozen decoder with the published weights at ``path``.

    Args:
        path: ``vq_ds16_c2i.pt``, or the safetensors file that :mod:`lit_shortcut.convert` made of it.
        **sizes: arguments of :class:`CodeDecoder` that differ from the published f16 decoder's.

    Raises:
        WeightsError: if the file is missing, damaged, or not of these sizes.
    """
    return filled(lambda: llamagen_decoder(**sizes), load_state(path), NAMES, path, _UNUSED)
