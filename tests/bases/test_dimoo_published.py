"""A tiny checkpoint folder in the published form, whole and damaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import VQModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from lit_shortcut.acceleration.accelerated import Accelerated
from lit_shortcut.acceleration.plans import Even
from lit_shortcut.acceleration.shortcut import Shortcut
from lit_shortcut.bases.dimoo.adapter import DiMOO
from lit_shortcut.bases.dimoo.llada import LLaDA
from lit_shortcut.bases.dimoo.prompt import TextTokenizer
from lit_shortcut.bases.dimoo.published import load_transformer, published, random_weights, read_sizes
from lit_shortcut.bases.prompted_llada import PromptContext
from lit_shortcut.bases.vq import VQDecoder
from lit_shortcut.contracts import Conditions
from lit_shortcut.networks.llada_shortcut import NAMES, LLaDAShortcutNet
from lit_shortcut.published import load_state, save_published
from lit_shortcut.sampling import Decoding, generate
from lit_shortcut.weights import WeightsError
from tests.published_dimoo import CONFIG, SHARDS, SPECIAL, make_checkpoint, tokenizer, transformer


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    make_checkpoint(folder)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(whole, tmp_path / "copy")


def one(prompt: str = "a cat") -> Conditions:
    return Conditions(*(torch.zeros(1, dtype=torch.long) for _ in range(3)), prompts=(prompt,))


def test_folder_becomes_a_base_with_its_weights_in_their_own_precision(whole: Path) -> None:
    base = published(str(whole), height=32, width=48, special=SPECIAL)
    assert {tensor.dtype for tensor in base.transformer.state_dict().values()} == {torch.bfloat16}
    for name, tensor in transformer().state_dict().items():
        assert torch.equal(base.transformer.state_dict()[name], tensor.bfloat16())
    assert not any(tensor.is_meta for tensor in (*base.parameters(), *base.buffers()))
    assert (base.spec.num_tokens, base.spec.codebook_size) == (6, 8)


def test_text_becomes_the_tokens_of_the_folders_tokenizer(whole: Path) -> None:
    base = published(str(whole), height=32, width=32, special=SPECIAL)
    context = base.context(one(), guided=True)
    decoded = Tokenizer.from_file(str(whole / "tokenizer.json"))
    head = "<system>Generate an image according to the text prompt.</system><user>"
    assert isinstance(context, PromptContext)
    assert context.prefix is not None
    for branch, prompt in enumerate(("a cat", "<uncondition>")):
        ids = context.ids[branch, 0, : int(context.prefix.lengths[branch])].tolist()
        assert decoded.decode(ids, skip_special_tokens=False) == f"{head}{prompt}</user>"
        assert (SPECIAL.uncondition in ids) == (prompt == "<uncondition>")


@pytest.mark.parametrize(("height", "width"), [(32, 32), (16, 48)])
def test_images_have_the_size_asked_for(whole: Path, height: int, width: int) -> None:
    base = published(str(whole), height=height, width=width, dtype="float32", special=SPECIAL)
    images = base.decode(
        generate(base, one(), Decoding(2, guidance=1.0), Accelerated(Even(2), Shortcut(network()))).tokens
    )
    assert images.dtype == torch.uint8
    assert images.shape == (1, 3, height, width)


def test_decoder_is_diffusers_own_on_the_codes_embeddings(whole: Path) -> None:
    decoder, codes = VQDecoder.load(whole / "vqvae", 2, 3), torch.tensor([[0, 1, 2, 3, 4, 7]])
    vqvae = VQModel.from_pretrained(whole / "vqvae", low_cpu_mem_usage=False, lookup_from_codebook=False)
    embedded = vqvae.quantize.embedding.weight[codes.view(1, 2, 3)].permute(0, 3, 1, 2)
    with torch.inference_mode():
        pixels = vqvae.decode(embedded, force_not_quantize=True).sample.clamp(0, 1)
    assert torch.equal(decoder.decode(codes), (pixels * 255).round().byte())
    assert len(decoder.decode(codes).unique()) > 2


def test_folder_with_one_weight_file_needs_no_index(folder: Path) -> None:
    tensors = load_file(folder / SHARDS[0]) | load_file(folder / SHARDS[1])
    for name in (*SHARDS, "model.safetensors.index.json"):
        (folder / name).unlink()
    save_file(tensors, folder / "model.safetensors")
    found = load_transformer(folder, torch.bfloat16).state_dict()
    assert all(torch.equal(found[name], tensor.bfloat16()) for name, tensor in transformer().state_dict().items())


def test_tied_weights_have_no_head_of_their_own(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG | {"weight_tying": True}))
    with pytest.raises(WeightsError, match=r"model\.transformer\.ff_out\.weight is unknown"):
        load_transformer(folder, torch.bfloat16)
    edit_shard(folder, 1, lambda tensors: tensors.pop("model.transformer.ff_out.weight"))
    loaded = load_transformer(folder, torch.bfloat16)
    assert loaded.head_weight is loaded.wte.weight


def test_sizes_of_llada_8b_give_its_number_of_parameters(tmp_path: Path) -> None:
    sizes = {"d_model": 4096, "n_heads": 32, "n_layers": 32, "mlp_hidden_size": 12288, "vocab_size": 126464}
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | sizes | {"embedding_size": None, "n_kv_heads": 32}))
    with torch.device("meta"):
        network = LLaDA(**read_sizes(tmp_path / "config.json"))
    assert sum(parameter.numel() for parameter in network.parameters()) == 8_015_581_184


# ---- the shortcut


def network() -> LLaDAShortcutNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return LLaDAShortcutNet(16, num_heads=2, mlp_width=24)


def test_published_shortcut_comes_back_as_it_was_written(tmp_path: Path) -> None:
    path, made = tmp_path / "dimoo-shortcut.pth", network()
    save_published(path, made, NAMES)
    assert {"proj_in.weight", "ln_f.weight", "time_embedder.mlp.0.bias"} <= load_state(path).keys()
    loaded = LLaDAShortcutNet.load_published(str(path), num_heads=2)
    assert loaded.hparams == made.hparams
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in made.state_dict().items())


def saved(path: Path, content: Any) -> str:
    torch.save(content, path)
    return str(path)


def test_file_that_is_no_published_shortcut_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    with pytest.raises(WeightsError, match=r"a\.pth: no such"):
        LLaDAShortcutNet.load_published(str(path))
    save_published(path, network(), NAMES)
    state = load_state(path)
    with pytest.raises(WeightsError, match=r"a\.pth: expected a state dict.*found list"):
        LLaDAShortcutNet.load_published(saved(path, [1]))
    with pytest.raises(WeightsError, match=r"a\.pth: expected a DiMOO-Shortcut state dict; 'ln_f\.weight' is missing"):
        LLaDAShortcutNet.load_published(saved(path, {"last_layer.0.weight": torch.ones(8)}))
    with pytest.raises(WeightsError, match=r"(?s)a\.pth: .*extra is unknown"):
        LLaDAShortcutNet.load_published(saved(path, state | {"extra": torch.ones(1)}), num_heads=2)
    with pytest.raises(WeightsError, match=r"a\.pth: width must be a multiple of 2 · num_heads"):
        LLaDAShortcutNet.load_published(saved(path, state), num_heads=3)


# ---- bad folders


def edit_shard(folder: Path, index: int, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / SHARDS[index])
    edit(tensors)
    save_file(tensors, folder / SHARDS[index])


def test_missing_shards_are_all_named(folder: Path) -> None:
    (folder / SHARDS[1]).unlink()
    with pytest.raises(WeightsError, match=rf"1 of 2 weight files are missing: {SHARDS[1]}; expected"):
        load_transformer(folder, torch.bfloat16)
    (folder / SHARDS[0]).unlink()
    with pytest.raises(WeightsError, match=rf"2 of 2 weight files are missing: {SHARDS[0]}, {SHARDS[1]}; expected"):
        load_transformer(folder, torch.bfloat16)


def test_tensors_missing_unknown_and_misshapen_are_all_named(folder: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.transformer.blocks.0.attn_out.bias"] = tensors.pop("model.transformer.blocks.0.attn_out.weight")
        tensors["model.transformer.blocks.0.ff_norm.weight"] = torch.ones(3)

    edit_shard(folder, 0, edit)
    with pytest.raises(WeightsError) as caught:
        load_transformer(folder, torch.bfloat16)
    assert str(caught.value).splitlines()[1:] == [
        "  model.transformer.blocks.0.attn_out.weight is missing, expected (16, 16)",
        "  model.transformer.blocks.0.attn_out.bias is unknown",
        "  model.transformer.blocks.0.ff_norm.weight has shape (3,), expected (16,)",
    ]
    assert str(folder) in str(caught.value)


def test_damaged_shard_is_named(folder: Path) -> None:
    (folder / SHARDS[0]).write_bytes((folder / SHARDS[0]).read_bytes()[:500])
    with pytest.raises(WeightsError, match=rf"{SHARDS[0]}: not a readable safetensors file"):
        load_transformer(folder, torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_model": None}, "d_model: expected a number, found None"),
        ({"weight_tying": "no"}, "weight_tying: expected a bool, found 'no'"),
        ({"n_layers": True}, "n_layers: expected a number, found True"),
        ({"block_type": "sequential"}, "block_type: expected 'llama', found 'sequential', which is not implemented"),
        ({"n_kv_heads": 1}, "n_kv_heads: expected as many as n_heads, found 1"),
    ],
)
def test_configuration_of_another_network_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | change))
    with pytest.raises(WeightsError, match=rf"config\.json: {message}"):
        read_sizes(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.json", r"config\.json: no such file; expected a folder of the published checkpoint"),
        ("tokenizer.json", r"tokenizer\.json: no such file; expected a text tokenizer"),
        ("vqvae/config.json", r"vqvae/config\.json: no such file"),
        ("vqvae/diffusion_pytorch_model.safetensors", "vqvae: 1 of 1 weight files are missing: diffusion_"),
    ],
)
def test_missing_file_is_named(folder: Path, name: str, message: str) -> None:
    (folder / name).unlink()
    with pytest.raises(WeightsError, match=message):
        published(str(folder), height=32, width=32, special=SPECIAL)


@pytest.mark.parametrize("content", ["{", "[]"])
def test_damaged_configuration_is_named(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(WeightsError, match=r"config\.json: (not a readable JSON file|expected a JSON object)"):
        load_transformer(folder, torch.bfloat16)


def test_vocabulary_is_that_of_the_table_whatever_the_configuration_says(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": 7, "embedding_size": None}))
    assert len(load_transformer(folder, torch.bfloat16).wte.weight) == len(transformer().wte.weight)


def test_cutting_and_padding_that_a_tokenizer_was_saved_with_are_left_out(tmp_path: Path) -> None:
    made = tokenizer("boi", "eoi", "answer_start", "answer_end", "uncondition")
    made.save(str(tmp_path / "plain.json"))
    made.enable_truncation(3)
    made.enable_padding(length=40)
    made.save(str(tmp_path / "cutting.json"))
    plain, cutting = (TextTokenizer(tmp_path / f"{name}.json", SPECIAL) for name in ("plain", "cutting"))
    assert cutting.encode("a long prompt") == plain.encode("a long prompt")
    assert len(plain.encode("a long prompt")) > 3


def test_tokenizer_without_the_special_tokens_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizer().save(str(path))
    with pytest.raises(WeightsError, match=r"tokenizer\.json: expected <uncondition> as 260, found None"):
        TextTokenizer(path, SPECIAL)
    tokenizer("eoi", "boi", "answer_start", "answer_end", "uncondition").save(str(path))
    with pytest.raises(WeightsError, match="expected <boi> as 256, found 257, <eoi> as 257, found 256: the tokenizer"):
        TextTokenizer(path, SPECIAL)
    path.write_text("{}")
    with pytest.raises(WeightsError, match=r"tokenizer\.json: not a tokenizer"):
        TextTokenizer(path, SPECIAL)


def test_size_that_is_no_multiple_of_16_is_refused(whole: Path) -> None:
    with pytest.raises(ValueError, match="width must be a positive multiple of 16 pixels, got 40"):
        published(str(whole), height=32, width=40, special=SPECIAL)


def test_base_of_the_folder_is_a_base(whole: Path) -> None:
    base = published(str(whole), height=32, width=32, special=SPECIAL)
    assert isinstance(base, DiMOO)
    assert base.fingerprint == published(str(whole), height=16, width=16, special=SPECIAL).fingerprint


# ---- sizes without weights


def small_random(seed: int = 0, device: str = "cpu") -> DiMOO:
    return random_weights(1, 32, 32, feature_width=16, num_heads=2, mlp_width=32, seed=seed, device=device)


def test_random_weights_are_labelled_and_repeatable() -> None:
    before = torch.get_rng_state()
    one, same, other = (small_random(seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert one.fingerprint.startswith("random-")
    assert one.fingerprint == same.fingerprint != other.fingerprint
    assert {tensor.dtype for tensor in one.parameters()} == {torch.bfloat16}
    assert all(bool(tensor.isfinite().all()) for tensor in one.parameters())


def test_random_weights_draw_tokens_but_no_images() -> None:
    base = small_random()
    tokens = generate(base, one(), Decoding(2, guidance=1.0), Accelerated(Even(2), Shortcut(network()))).tokens
    assert bool((tokens < base.spec.codebook_size).all())
    with pytest.raises(ValueError, match="no image decoder"):
        base.decode(tokens)


def test_base_on_the_meta_device_has_no_weights_at_all() -> None:
    base = small_random(device="meta")
    assert all(tensor.is_meta for tensor in (*base.parameters(), *base.buffers()))
    assert base.spec == small_random().spec
