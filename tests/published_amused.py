"""Tiny parts of aMUSEd, and a folder of them in the published form: 16 pixels a token, 8 codes, features 32 wide."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import UVit2DModel, VQModel
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from lit_shortcut.bases.amused import AMUSEd
from lit_shortcut.bases.clip_text import Bytes, CLIPText
from lit_shortcut.bases.vq import VQDecoder

CODES = 8
BEGIN, END = 512, 513  # behind 256 bytes within words and 256 at their ends
UNET: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "in_channels": 32,
    "block_out_channels": 32,
    "num_res_blocks": 1,
    "block_num_heads": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "encoder_hidden_size": 16,
    "cond_embed_dim": 12,
    "micro_cond_encode_dim": 8,
    "micro_cond_embed_dim": 40,
    "vocab_size": 10,
    "codebook_size": CODES,
    "sample_size": 4,
}
TEXT: dict[str, Any] = {
    "vocab_size": 514,
    "hidden_size": 16,
    "intermediate_size": 24,
    "projection_dim": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 20,
    "bos_token_id": BEGIN,
    "eos_token_id": END,
    "pad_token_id": END,
}


def transformer(seed: int = 0, **changes: Any) -> UVit2DModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = UVit2DModel(**UNET | changes)
        for name, parameter in made.named_parameters():
            if name.endswith(("gamma", "beta", "norm.weight")):
                torch.nn.init.normal_(parameter, mean=float(name.endswith("weight")), std=0.1)
        return made


def text_model(seed: int = 0, **changes: Any) -> CLIPTextModelWithProjection:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CLIPTextModelWithProjection(CLIPTextConfig(**TEXT | changes))


def vqvae(codes: int = CODES) -> VQModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return VQModel(
            block_out_channels=(8, 8, 8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 5,
            up_block_types=("UpDecoderBlock2D",) * 5,
            norm_num_groups=2,
            latent_channels=4,
            num_vq_embeddings=codes,
            mid_block_add_attention=False,
            lookup_from_codebook=True,
        )


def tiny_amused(seed: int = 0, **changes: Any) -> AMUSEd:
    """A base of 4×4 tokens, 8 codes; prompts in bytes."""
    return AMUSEd(transformer(seed, **changes), VQDecoder(vqvae(), 4, 4), CLIPText(text_model(), Bytes(BEGIN, END)))


def write_words(folder: Path) -> None:
    """A CLIP tokenizer without merges: letters alone, the last of each word marked."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: id_ for id_, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    settings = {"model_max_length": TEXT["max_position_embeddings"], "tokenizer_class": "CLIPTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_folder(folder: Path, variant: str | None = None, **changes: Any) -> None:
    """Everything that a pipeline of diffusers saves, but for its scheduler."""
    for name, module in {"transformer": transformer(**changes), "vqvae": vqvae(), "text_encoder": text_model()}.items():
        (module if variant is None else module.half()).save_pretrained(folder / name, variant=variant)
    write_words(folder / "tokenizer")
