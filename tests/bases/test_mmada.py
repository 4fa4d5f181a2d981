"""MMaDA as published, in small: its folder, its prompts, and what is refused."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_shortcut.acceleration.accelerated import Accelerated, Vanilla
from lit_shortcut.acceleration.plans import Even
from lit_shortcut.acceleration.shortcut import Shortcut
from lit_shortcut.bases.mmada.adapter import MMaDA, MMaDATokens
from lit_shortcut.bases.mmada.magvit import bits_of_codes
from lit_shortcut.bases.mmada.published import published, random_weights
from lit_shortcut.contracts import Conditions
from lit_shortcut.networks.llada_shortcut import LLaDAShortcutNet
from lit_shortcut.sampling import Decoding, generate
from lit_shortcut.weights import WeightsError
from tests.published_dimoo import CONFIG
from tests.published_mmada import make_release, shrink

RESERVED = {"mask": 258, "t2i": 2, "soi": 3, "eoi": 4}  # within the tokenizer's ids, as the published ones are
DECODING = Decoding(
    3, "cosine_each", guidance=1.5, guidance_course="constant", confidence_noise=1.0, noise_course="product"
)


def special(**changes: int) -> MMaDATokens:
    return MMaDATokens(**{"bos": 256, "eos": 257, "first_code": 259} | RESERVED | changes)


@pytest.fixture
def release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the transformer and text tokenizer, with the image decoder's in ``vq``."""
    shrink(monkeypatch)
    make_release(tmp_path / "release")
    return tmp_path / "release"


def loaded(release: Path, **changes: Any) -> MMaDA:
    return published(str(release), str(release / "vq"), size=64, **{"dtype": "float32"} | changes)


def prompted(*prompts: str) -> Conditions:
    ids = torch.arange(len(prompts))
    return Conditions(ids, ids, ids, prompts)


def trained() -> LLaDAShortcutNet:
    torch.manual_seed(1)
    network = LLaDAShortcutNet(16, num_heads=2, mlp_width=24)
    assert isinstance(network.widen, torch.nn.Linear)
    torch.nn.init.normal_(network.widen.weight, std=0.3)
    return network.eval().requires_grad_(False)


def test_ids_are_those_of_the_tokenizer(release: Path) -> None:
    base = loaded(release)
    assert base.special == MMaDATokens(bos=256, eos=257, first_code=259)
    assert (base.spec.num_tokens, base.spec.codebook_size, base.spec.sequence_length) == (16, 8192, 16 + 2 + 513)
    assert torch.equal(base.interface.code_embedding, base.transformer.wte.weight[259 : 259 + 8192])


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_wrapped_names_are_the_same_weights(release: Path, prefix: str) -> None:
    expected = loaded(release, special=special()).identity()
    state = load_file(release / "model.safetensors")
    save_file({prefix + name: tensor for name, tensor in state.items()}, release / "model.safetensors")
    vq = torch.load(release / "vq" / "pytorch_model.bin", weights_only=True)
    (release / "vq" / "pytorch_model.bin").unlink()
    save_file({prefix + name: tensor for name, tensor in vq.items()}, release / "vq" / "model.safetensors")
    assert loaded(release, special=special()).identity() == expected


def test_tied_head_is_the_embedding_table(release: Path) -> None:
    (release / "config.json").write_text(json.dumps(CONFIG | {"weight_tying": True}))
    with pytest.raises(WeightsError, match=r"model\.transformer\.ff_out\.weight is unknown"):
        loaded(release)
    state = load_file(release / "model.safetensors")
    del state["model.transformer.ff_out.weight"]
    save_file(state, release / "model.safetensors")
    base = loaded(release)
    assert torch.equal(base.interface.head_weight, base.interface.code_embedding)


@pytest.mark.parametrize("guidance", [0.0, 1.5])
def test_base_draws_images_and_full_budget_equals_vanilla(release: Path, guidance: float) -> None:
    base, decoding = loaded(release, special=special()), Decoding(3, "cosine_each", guidance=guidance)
    conditions = prompted("a cat", "two grey cats")
    vanilla = generate(base, conditions, decoding, Vanilla()).tokens
    shortcut = Shortcut(trained())
    assert torch.equal(generate(base, conditions, decoding, Accelerated(Even(3), shortcut)).tokens, vanilla)
    assert not torch.equal(generate(base, conditions, decoding, Accelerated(Even(1), shortcut)).tokens, vanilla)
    assert base.decode(vanilla).shape == (2, 3, 8, 8)


@pytest.mark.parametrize("budget", [1, 3])
def test_prompts_of_different_lengths_in_a_batch_give_the_tokens_they_give_alone(release: Path, budget: int) -> None:
    base, acceleration = loaded(release, special=special()), Accelerated(Even(budget), Shortcut(trained()))
    everyone = prompted("a", "a longer one", "größer")
    together = generate(base, everyone, DECODING, acceleration).tokens
    for row in range(3):
        alone = Conditions(*(field[row : row + 1] for field in everyone))
        assert torch.equal(generate(base, alone, DECODING, acceleration).tokens[0], together[row])


def test_text_is_cut_where_the_reference_cuts_it(release: Path) -> None:
    base = loaded(release, special=special(), max_text_tokens=6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fits = base.prompt_ids("abcd")
    assert fits[:2] == [2, 256]
    assert (len(fits), fits[-1]) == (7, 257)
    with pytest.warns(UserWarning, match="'abcde'… has 7 tokens, the base takes 6: the rest is cut"):
        assert base.prompt_ids("abcde") == fits
    assert base.unconditional_ids() == [2, 256, 257]
    assert base.spec.sequence_length == 16 + 2 + 7


def test_special_token_spelt_in_a_prompt_is_text(release: Path) -> None:
    base = loaded(release)
    ids = base.prompt_ids("<bos> a <mask> of <eos>")
    assert [id_ for id_ in ids if id_ in (256, 257, 258)] == [256, 257]


def test_begin_token_that_the_tokenizer_puts_is_not_doubled(release: Path) -> None:
    base = loaded(release, special=special(bos=base_letter(release, "a")))
    assert base.prompt_ids("ab") == [2, *base.prompt_tokenizer.encode("ab"), 257]


def base_letter(release: Path, letter: str) -> int:
    (id_,) = loaded(release).prompt_tokenizer.encode(letter)
    return id_


# ---- bad input


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: s.pop("model.transformer.ln_f.weight"), r"model\.transformer\.ln_f\.weight is missing"),
        (lambda s: s.update({"model.extra": torch.ones(1)}), r"model\.extra is unknown"),
        (
            lambda s: s.update({"model.transformer.blocks.0.ff_proj.weight": torch.ones(3, 16)}),
            r"blocks\.0\.ff_proj\.weight has shape \(3, 16\), expected \(24, 16\)",
        ),
    ],
    ids=["missing", "unknown", "shape"],
)
def test_transformer_that_does_not_fit_is_refused_by_name(
    release: Path, edit: Callable[[dict[str, Tensor]], Any], message: str
) -> None:
    state = load_file(release / "model.safetensors")
    edit(state)
    save_file(state, release / "model.safetensors")
    with pytest.raises(WeightsError, match=message):
        loaded(release)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: s.pop("decoder.post_quant_conv.bias"), r"decoder\.post_quant_conv\.bias is missing"),
        (lambda s: s.pop("quantize.embedding"), r"quantize\.embedding is missing, expected \(8192, 13\)"),
        (lambda s: s.update({"decoder.up.0.attn.0.q.bias": torch.ones(1)}), r"decoder\.up\.0\.attn\.0\.q\.bias is"),
        (lambda s: s.pop("decoder.up.1.block.0.conv1.weight"), r"decoder\.up\.1\.block\.0\.conv1\.weight is missing"),
        (lambda s: s.update({"quantize.embedding": -bits_of_codes(13)}), r"quantize\.embedding: expected the bits"),
    ],
    ids=["missing", "codes", "unknown", "block", "bits"],
)
def test_decoder_that_does_not_fit_is_refused_by_name(
    release: Path, edit: Callable[[dict[str, Tensor]], Any], message: str
) -> None:
    file = release / "vq" / "pytorch_model.bin"
    state = torch.load(file, weights_only=True)
    edit(state)
    torch.save(state, file)
    with pytest.raises(WeightsError, match=message):
        loaded(release)


class Marks:
    """Leaves a mark where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_pickled_code_is_not_run(release: Path, tmp_path: Path) -> None:
    torch.save({"weights": Marks(tmp_path / "mark")}, release / "vq" / "pytorch_model.bin")
    with pytest.raises(WeightsError, match=r"pytorch_model\.bin: not a checkpoint that loads with weights_only"):
        loaded(release)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.json", r"config\.json: no such file"),
        ("model.safetensors", r"1 of 1 weight files are missing: model\.safetensors"),
        ("tokenizer.json", r"tokenizer\.json: no such file"),
        ("tokenizer_config.json", r"tokenizer_config\.json: no such file"),
        ("vq/pytorch_model.bin", r"vq: no weights; expected one of .*pytorch_model\.bin"),
    ],
)
def test_missing_file_is_named(release: Path, name: str, message: str) -> None:
    (release / name).unlink()
    with pytest.raises(WeightsError, match=message):
        loaded(release)


@pytest.mark.parametrize("config", [{}, {"bos_token": "<bos>"}, {"bos_token": "<bos>", "eos_token": "<nothing>"}])
def test_tokenizer_that_names_no_such_token_is_refused(release: Path, config: dict[str, str]) -> None:
    (release / "tokenizer_config.json").write_text(json.dumps(config))
    wrong = "eos_token" if config else "bos_token"
    with pytest.raises(WeightsError, match=rf"tokenizer_config\.json: {wrong}: expected a token of tokenizer\.json"):
        loaded(release)


def test_sizes_that_do_not_fit_are_refused(release: Path) -> None:
    with pytest.raises(ValueError, match=r"max_text_tokens must be at least 3.*got 2"):
        loaded(release, max_text_tokens=2)
    with pytest.raises(ValueError, match=r"codes 120000\.\.128191 lie outside the transformer's vocabulary of 126400"):
        loaded(release, special=special(first_code=120_000))
    with pytest.raises(ValueError, match=r"special tokens \{'soi': 126400\} lie outside"):
        loaded(release, special=special(soi=126_400))
    with pytest.raises(ValueError, match=r"height and width must be equal.*got 64 and 32"):
        MMaDA(*[None] * 3, special=special(), height=64, width=32)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="height must be a positive multiple of 16 pixels, got 40"):
        published(str(release), str(release / "vq"), size=40)


def test_hub_addresses_lead_to_the_cache(release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightsError, match=r"hf download someone/mmada --include 'config\.json'"):
        published("hf://someone/mmada", str(release / "vq"))
    for name, source in (("mmada", release), ("vq", release / "vq")):
        folder = tmp_path / f"models--someone--{name}"
        shutil.copytree(source, folder / "snapshots" / ("c" * 40))
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("c" * 40)
    cached = published("hf://someone/mmada", "hf://someone/vq", size=64, dtype="float32")
    assert cached.identity() == loaded(release).identity()


def test_random_weights_are_labelled_and_repeatable() -> None:
    def small(seed: int = 0, device: str = "cpu") -> MMaDA:
        return random_weights(1, 64, feature_width=16, num_heads=2, mlp_width=32, seed=seed, device=device)

    before = torch.get_rng_state()
    one, same, other = (small(seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert one.fingerprint.startswith("random-")
    assert one.fingerprint == same.fingerprint != other.fingerprint
    tokens = generate(one, prompted("a cat"), DECODING, Accelerated(Even(2), Shortcut(trained().bfloat16()))).tokens
    assert bool((tokens < 8192).all())
    with pytest.raises(ValueError, match="no image decoder"):
        one.decode(tokens)
    assert small(device="meta").spec == one.spec
