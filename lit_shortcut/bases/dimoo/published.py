"""Lumina-DiMOO as published (Alpha-VLLM/Lumina-DiMOO): with its weights, or at its sizes with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lit_shortcut.bases.dimoo.adapter import DiMOO
from lit_shortcut.bases.dimoo.llada import LLaDA
from lit_shortcut.bases.dimoo.prompt import SpecialTokens, TextTokenizer, Utf8Tokenizer
from lit_shortcut.bases.frozen import grid_of
from lit_shortcut.bases.prompted_llada import PromptedLLaDA
from lit_shortcut.bases.saved import TRANSFORMERS, read_json, read_weights
from lit_shortcut.bases.vq import VQDecoder
from lit_shortcut.hub import local_folder
from lit_shortcut.published import Names, filled, unwrapped
from lit_shortcut.weights import Precision, WeightsError

Base = TypeVar("Base", bound=PromptedLLaDA)

PATCH_SIZE = 16
VOCAB_SIZE = 134_548  # 126,356 of text and special tokens, 8,192 codes; what the release of MIGM-Shortcut sets
FILES = ("config.json", "model*.safetensors*", "tokenizer*", "vqvae/*")
_PREFIX = "model.transformer."

_SIZES = {  # ours, by the configuration's keys
    "d_model": "width",
    "n_layers": "depth",
    "n_heads": "num_heads",
    "mlp_hidden_size": "mlp_width",
    "rope_theta": "rope_theta",
    "rms_norm_eps": "norm_eps",
    "weight_tying": "is_tied",
}
_VARIANTS = {  # values of LLaDA's configuration that are implemented
    "block_type": ("llama",),
    "activation_type": ("silu",),
    "layer_norm_type": ("rms",),
    "rope": (True,),
    "alibi": (False, None),
    "include_bias": (False, None),
    "include_qkv_bias": (False, None),
    "attention_layer_norm": (False, None),
    "input_emb_norm": (False, None),
    "scale_logits": (False, None),
    "multi_query_attention": (False, None),
}


def published(
    source: str,
    height: int = 1024,
    width: int = 1024,
    *,
    max_prompt_tokens: int = 512,
    dtype: Precision = "bfloat16",
    special: SpecialTokens | None = None,
) -> DiMOO:
    """The base with published weights.

    Args:
        source: folder, or address on the hub: ``hf://Alpha-VLLM/Lumina-DiMOO``.
        height: height of the images in pixels, a multiple of 16.
        width: width of the images in pixels, a multiple of 16.
        max_prompt_tokens: longest prompt in tokens, template included.
        dtype: dtype of the transformer's weights; weights stored in it are mapped from the files and not copied.
        special: ids of the tokens that are not text; None takes the published ones.

    Raises:
        WeightsError: if a file is unavailable, damaged, or does not fit the others.
        ValueError: if height or width is not a multiple of 16.
    """
    grid = grid_of(height, width, PATCH_SIZE)  # before anything is downloaded
    folder, special = local_folder(source, FILES), special or SpecialTokens()
    decoder = VQDecoder.load(folder / "vqvae", *grid)
    return DiMOO(
        load_transformer(folder, getattr(torch, dtype)),
        decoder,
        TextTokenizer(folder / "tokenizer.json", special),
        special=special,
        codebook_size=decoder.codebook_size,
        height=height,
        width=width,
        patch_size=PATCH_SIZE,
        max_prompt_tokens=max_prompt_tokens,
    )


def random_weights(
    depth: int = 32,
    height: int = 1024,
    width: int = 1024,
    *,
    vocab_size: int = VOCAB_SIZE,
    **transformer: Any,
) -> DiMOO:
    """The base at published sizes with random weights: for latency and memory, never for quality.

    Its fingerprint begins with ``random-``. Text tokens are the bytes of a prompt, without a template, and there is no
    image decoder.

    Args:
        depth: transformer blocks; a base with fewer than published fits anywhere.
        height: height of the images in pixels, a multiple of 16.
        width: width of the images in pixels, a multiple of 16.
        vocab_size: number of text tokens and codes.
        **transformer: other arguments of :func:`random_transformer`.

    Raises:
        ValueError: if height or width is not a multiple of 16, or sizes do not fit one another.
    """
    special = SpecialTokens()
    return as_random(
        DiMOO(
            random_transformer(vocab_size, depth, **transformer),
            NoDecoder(),
            Utf8Tokenizer(special.uncondition),
            special=special,
            height=height,
            width=width,
            patch_size=PATCH_SIZE,
            template="{}",
        )
    )


def as_random(base: Base) -> Base:
    """Label ``base`` as random, and move it to the device of its transformer."""
    base.label = "random-"
    return base.to(base.transformer.wte.weight.device)


def random_transformer(
    vocab_size: int,
    depth: int,
    *,
    feature_width: int = 4096,
    num_heads: int = 32,
    mlp_width: int = 12288,
    dtype: Precision = "bfloat16",
    device: str = "cpu",
    seed: int = 0,
) -> LLaDA:
    """A transformer with random weights.

    Args:
        vocab_size: number of text tokens and codes.
        depth: transformer blocks.
        feature_width: C.
        num_heads: attention heads.
        mlp_width: hidden width of the SwiGLUs.
        dtype: dtype of the weights.
        device: device of the weights; on ``meta`` they have only shapes and take no memory.
        seed: seed of the weights.
    """
    with torch.device("meta"):
        transformer = LLaDA(vocab_size, feature_width, depth, num_heads, mlp_width).to(getattr(torch, dtype))
    if device != "meta":
        transformer.to_empty(device=device)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for module in transformer.modules():
                if isinstance(module, (nn.Embedding, nn.Linear, nn.RMSNorm)):
                    module.reset_parameters()
    return transformer


class NoDecoder:
    """Placeholder for the image decoder of a base with random weights."""

    def decode(self, tokens: Tensor) -> Tensor:
        """Raise ValueError: such a base generates no images."""
        raise ValueError("a base with random weights has no image decoder")


def load_transformer(folder: Path, dtype: torch.dtype) -> LLaDA:
    """The frozen transformer of the checkpoint in ``folder``; weights stored in ``dtype`` are mapped from the files.

    Raises:
        WeightsError: if a file is missing or damaged, or tensors are missing, unknown or misshapen; all are named.
    """
    sizes, state = read_sizes(folder / "config.json"), unwrapped(read_weights(folder, TRANSFORMERS, dtype=dtype))
    if (table := state.get(f"{_PREFIX}wte.weight")) is not None:
        sizes["vocab_size"] = len(table)  # the release overrides its configuration's value
    return filled(lambda: LLaDA(**sizes).to(dtype), state, Names([(_PREFIX, "")]), folder)


def read_sizes(path: Path) -> dict[str, Any]:
    """Arguments of :class:`LLaDA` in the checkpoint's ``config.json`` at ``path``.

    Raises:
        WeightsError: if the file is missing or damaged, lacks a size, or describes a variant that is not implemented.
    """
    config = read_json(path)
    for key, known in _VARIANTS.items():
        if key in config and config[key] not in known:
            raise WeightsError(f"{path}: {key}: expected {known[0]!r}, found {config[key]!r}, which is not implemented")
    if config.get("n_kv_heads") not in (None, config.get("n_heads")):
        raise WeightsError(f"{path}: n_kv_heads: expected as many as n_heads, found {config['n_kv_heads']!r}")
    vocabulary = "embedding_size" if config.get("embedding_size") else "vocab_size"
    sizes = {}
    for key, ours in (_SIZES | {vocabulary: "vocab_size"}).items():
        value = config.get(key)
        if isinstance(value, bool) != (key == "weight_tying") or not isinstance(value, (int, float)):
            raise WeightsError(
                f"{path}: {key}: expected a {'bool' if key == 'weight_tying' else 'number'}, found {value!r}"
            )
        sizes[ours] = value
    return sizes
