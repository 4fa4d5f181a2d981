"""A tiny Lumina-DiMOO checkpoint in the published form: 16 pixels a token, 8 codes, features 16 wide."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import VQModel
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from lit_shortcut.bases.dimoo.llada import LLaDA
from lit_shortcut.bases.dimoo.prompt import SpecialTokens

SPECIAL = SpecialTokens(
    boi=256, eoi=257, answer_start=258, answer_end=259, uncondition=260, mask=261, newline=262, first_code=264
)
CONFIG: dict[str, Any] = {
    "d_model": 16,
    "n_heads": 2,
    "n_layers": 2,
    "mlp_hidden_size": 24,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "vocab_size": 264,
    "embedding_size": 280,
    "weight_tying": False,
    "block_type": "llama",
    "n_kv_heads": 2,
    "rope": True,
}
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def tokenizer(*names: str) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: id_ for id_, letter in enumerate(alphabet)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens([AddedToken(f"<{name}>") for name in names])  # ids follow in this order
    return made


def transformer() -> LLaDA:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LLaDA(vocab_size=280, width=16, depth=2, num_heads=2, mlp_width=24)


def make_checkpoint(folder: Path) -> None:
    """Write the folder's files: two shards of a random transformer, a tokenizer of bytes, an image decoder."""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    tensors = {f"model.transformer.{name}": value.bfloat16() for name, value in transformer().state_dict().items()}
    names = sorted(tensors)
    parts = dict(zip(SHARDS, (names[:10], names[10:]), strict=True))
    for shard, own in parts.items():
        save_file({name: tensors[name] for name in own}, folder / shard)
    weight_map = {name: shard for shard, own in parts.items() for name in own}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    tokenizer("boi", "eoi", "answer_start", "answer_end", "uncondition").save(str(folder / "tokenizer.json"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vqvae = VQModel(
            block_out_channels=(8, 8, 8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 5,
            up_block_types=("UpDecoderBlock2D",) * 5,
            norm_num_groups=2,
            latent_channels=4,
            num_vq_embeddings=8,
            lookup_from_codebook=True,
        )
    vqvae.save_pretrained(folder / "vqvae")
