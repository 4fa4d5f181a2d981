"""Tiny parts of Meissonic, and a folder of them in the published form: 16 pixels a token, 8 codes, features 24 wide."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lit_shortcut.bases.clip_text import Bytes, CLIPText
from lit_shortcut.bases.meissonic.adapter import Meissonic
from lit_shortcut.bases.meissonic.transformer import MeissonicTransformer
from lit_shortcut.bases.vq import VQDecoder
from tests.published_amused import BEGIN, CODES, END, text_model, vqvae, write_words

SIZES: dict[str, Any] = {
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 12,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "pooled_projection_dim": 24,
    "axes_dims_rope": [4, 4, 4],
    "vocab_size": 10,
    "codebook_size": CODES,
}
UNUSED = {"_class_name": "Transformer2DModel", "patch_size": 1, "in_channels": 64, "guidance_embeds": False}


def transformer(seed: int = 0, **changes: Any) -> MeissonicTransformer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MeissonicTransformer(**SIZES | changes)


def tiny_meissonic(seed: int = 0, pixels: int = 64, **changes: Any) -> Meissonic:
    """A base of 16 pixels a token, 8 codes; prompts in bytes."""
    text = CLIPText(text_model(projection_dim=24), Bytes(BEGIN, END))
    side = pixels // 16
    return Meissonic(
        transformer(seed, **changes),
        VQDecoder(vqvae(), side, side),
        text,
        height=pixels,
        width=pixels,
        negative="blurry",
    )


def write_folder(folder: Path, variant: str | None = None, **changes: Any) -> None:
    """Everything that the published pipeline saves, but for its scheduler."""
    network = transformer(**changes)
    own = folder / "transformer"
    own.mkdir(parents=True)
    (own / "config.json").write_text(json.dumps(UNUSED | network.hparams))
    name = f"diffusion_pytorch_model{f'.{variant}' if variant else ''}.safetensors"
    save_file((network if variant is None else network.half()).state_dict(), own / name)
    for part, module in {"vqvae": vqvae(), "text_encoder": text_model(projection_dim=24)}.items():
        (module if variant is None else module.half()).save_pretrained(folder / part, variant=variant)
    write_words(folder / "tokenizer")
