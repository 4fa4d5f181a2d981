"""A tiny MMaDA checkpoint in the published form: features 16 wide, the true numbers of codes and tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lit_shortcut.bases.code_decoder import CodeDecoder
from lit_shortcut.bases.dimoo.llada import LLaDA
from lit_shortcut.bases.mmada import magvit
from lit_shortcut.bases.mmada.magvit import magvit_decoder
from lit_shortcut.published import Names
from tests.published_dimoo import CONFIG, tokenizer


def shrink(patch: pytest.MonkeyPatch) -> None:
    """Make the image decoder tiny."""
    for name, value in (("width", 32), ("multipliers", [1, 1]), ("num_blocks", [2, 1])):
        patch.setitem(magvit._SIZES, name, value)


def vq_state(decoder: CodeDecoder) -> dict[str, Tensor]:
    """``decoder``'s tensors under their published names, with those beside them that are not used."""
    pairs = [("decoder.post_quant_conv.", "post_quant_conv."), ("quantize.embedding", "codes.weight")]
    names = Names(pairs + magvit.taming_pairs(len(decoder.hparams["multipliers"])))
    state = {names.published(name): tensor.contiguous() for name, tensor in decoder.state_dict().items()}
    return state | {"encoder.conv_in.bias": torch.ones(1), "quantize.power_vals": torch.tensor([4096])}


def make_release(folder: Path) -> None:
    """Write transformer and text tokenizer to ``folder``, the image decoder to ``vq`` in it."""
    (folder / "vq").mkdir(parents=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = LLaDA(vocab_size=126_400, width=16, depth=2, num_heads=2, mlp_width=24)
        decoder = magvit_decoder()
    config = CONFIG | {"vocab_size": 100, "embedding_size": 200}  # of before the codes were added
    (folder / "config.json").write_text(json.dumps(config))
    state = {f"model.transformer.{name}": tensor for name, tensor in transformer.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    tokenizer("bos", "eos", "mask").save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<bos>", "eos_token": {"content": "<eos>", "lstrip": False}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    torch.save(vq_state(decoder), folder / "vq" / "pytorch_model.bin")
