"""MMaDA as published (Gen-Verse/MMaDA-8B): with its weights, or at its sizes with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lit_shortcut.bases.dimoo.prompt import TextTokenizer, Utf8Tokenizer
from lit_shortcut.bases.dimoo.published import PATCH_SIZE, NoDecoder, as_random, load_transformer, random_transformer
from lit_shortcut.bases.frozen import grid_of
from lit_shortcut.bases.mmada.adapter import MMaDA, MMaDATokens
from lit_shortcut.bases.mmada.magvit import FILES as VQ_FILES
from lit_shortcut.bases.mmada.magvit import load_magvit
from lit_shortcut.bases.saved import read_json
from lit_shortcut.hub import local_folder
from lit_shortcut.weights import Precision, WeightsError

VOCAB_SIZE = 134_656  # 126,464 rows of LLaDA, 8,192 more; codes begin before the added rows
FILES = ("config.json", "model*.safetensors*", "tokenizer*")


def published(
    source: str,
    vq: str,
    size: int = 512,
    *,
    max_text_tokens: int = 512,
    dtype: Precision = "bfloat16",
    special: MMaDATokens | None = None,
) -> MMaDA:
    """The base with published weights.

    Args:
        source: folder, or address on the hub: ``hf://Gen-Verse/MMaDA-8B-Base``, ``hf://Gen-Verse/MMaDA-8B-MixCoT``.
        vq: folder of the image decoder's weights, or ``hf://showlab/magvitv2``.
        size: side of the images in pixels, a multiple of 16.
        max_text_tokens: longest text, with t2i and bos; a longer one is cut.
        dtype: dtype of the transformer's weights; weights stored in it are mapped from the files and not copied.
        special: ids of the tokens that are not text; None takes the published ones, with bos, eos and the first code
            of the folder's tokenizer.

    Raises:
        WeightsError: if a file is unavailable, damaged, or does not fit the others.
        ValueError: if ``size`` is not a multiple of 16.
    """
    grid_of(size, size, PATCH_SIZE)  # before anything is downloaded
    folder = local_folder(source, FILES)
    text = TextTokenizer(folder / "tokenizer.json", None)
    decoder = load_magvit(local_folder(vq, VQ_FILES))
    return MMaDA(
        load_transformer(folder, getattr(torch, dtype)),
        decoder,
        text,
        special=special or tokens_of(text, folder / "tokenizer_config.json"),
        codebook_size=decoder.codebook_size,
        height=size,
        width=size,
        patch_size=PATCH_SIZE,
        max_text_tokens=max_text_tokens,
    )


def tokens_of(text: TextTokenizer, path: Path) -> MMaDATokens:
    """The published ids, with bos and eos of the configuration at ``path``, and codes after all tokens of ``text``.

    Raises:
        WeightsError: if the file is missing or damaged, or does not name them.
    """
    config, ids = read_json(path), {}
    for name in ("bos", "eos"):
        token = config.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        id_ = text.id_of(token) if isinstance(token, str) else None
        if id_ is None:
            raise WeightsError(f"{path}: {name}_token: expected a token of tokenizer.json beside it, found {token!r}")
        ids[name] = id_
    return MMaDATokens(first_code=len(text), **ids)


def random_weights(
    depth: int = 32,
    size: int = 512,
    *,
    vocab_size: int = VOCAB_SIZE,
    **transformer: Any,
) -> MMaDA:
    """The base at published sizes with random weights: for latency and memory, never for quality.

    Its fingerprint begins with ``random-``. Text tokens are the bytes of a prompt, and there is no image decoder.

    Args:
        depth: transformer blocks; a base with fewer than published fits anywhere.
        size: side of the images in pixels, a multiple of 16.
        vocab_size: number of text tokens and codes.
        **transformer: other arguments of :func:`~lit_shortcut.bases.dimoo.published.random_transformer`.

    Raises:
        ValueError: if ``size`` is not a multiple of 16, or sizes do not fit one another.
    """
    network = random_transformer(vocab_size, depth, **transformer)
    text = Utf8Tokenizer(uncondition=-1)
    return as_random(MMaDA(network, NoDecoder(), text, height=size, width=size, patch_size=PATCH_SIZE))
