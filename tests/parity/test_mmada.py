"""Golden tensors of the reference implementation; README.md beside this file says how they were made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lit_shortcut.acceleration.accelerated import Vanilla
from lit_shortcut.bases.code_decoder import CodeDecoder
from lit_shortcut.bases.dimoo.published import load_transformer
from lit_shortcut.bases.mmada.adapter import MMaDA, MMaDATokens
from lit_shortcut.bases.mmada.magvit import load_magvit
from lit_shortcut.contracts import Clock, Conditions
from lit_shortcut.decoding.schedules import tokens_per_step
from lit_shortcut.guidance import guide
from lit_shortcut.sampling import Decoding, sample
from lit_shortcut.weights import load_tensors, save_tensors

GOLDEN, META = load_tensors(Path(__file__).with_name("mmada_tiny.safetensors"))
NUM_TOKENS = META["grid"] ** 2
pytestmark = pytest.mark.filterwarnings("ignore:.*the rest is cut")  # of texts that the reference cuts, too


def names(prefix: str) -> list[str]:
    return [name.removeprefix(prefix) for name in sorted(GOLDEN) if name.startswith(prefix)]


def part(prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in GOLDEN.items() if name.startswith(prefix)}


TEXTS = sorted(names("in.text_"), key=int)


class RecordedTexts:
    def encode(self, text: str, template: str = "{}") -> list[int]:
        ids: list[int] = GOLDEN[f"in.text_{text}"].tolist() if text else []
        return ids

    def identity(self) -> str:
        return "recorded"


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> CodeDecoder:
    folder = tmp_path_factory.mktemp("vq")
    save_tensors(folder / "model.safetensors", part("vq."), {})
    sizes = {name: META[f"vq_{key}"] for name, key in [("multipliers", "ch_mult"), ("num_blocks", "num_res_blocks")]}
    return load_magvit(folder, META["vq_bits"], width=META["vq_ch"], **sizes)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, decoder: CodeDecoder) -> MMaDA:
    folder = tmp_path_factory.mktemp("base")
    save_tensors(folder / "model.safetensors", part("base."), {})
    keys = ("d_model", "n_layers", "n_heads", "mlp_hidden_size", "rope_theta", "rms_norm_eps", "embedding_size")
    config = {key: META[key] for key in keys} | {"weight_tying": "base.model.transformer.ff_out.weight" not in GOLDEN}
    (folder / "config.json").write_text(json.dumps(config))
    special = {name: META[name] for name in ("bos", "eos", "mask", "t2i", "soi", "eoi")}
    return MMaDA(
        load_transformer(folder, torch.float32),
        decoder,
        RecordedTexts(),
        special=MMaDATokens(first_code=META["text_vocab"], **special),
        codebook_size=META["codebook"],
        height=META["grid"],
        width=META["grid"],
        patch_size=1,
        max_text_tokens=META["max_seq_length"],
    )


def conditions() -> Conditions:
    ids = torch.arange(len(TEXTS))
    return Conditions(ids, ids, ids, prompts=tuple(TEXTS))


@pytest.mark.parametrize("branch", ["", "uncond_"])
def test_prompts_are_laid_out_as_in_the_reference(base: MMaDA, branch: str) -> None:
    for text, ids, mask in zip(
        TEXTS, GOLDEN[f"in.{branch}sequence"], GOLDEN[f"in.{branch}attention_mask"].bool(), strict=True
    ):
        image = [base.special.soi, *[base.special.mask] * NUM_TOKENS, base.special.eoi]
        prompt = base.unconditional_ids() if branch else base.prompt_ids(text)
        assert ids[mask].tolist() == prompt + image


def test_features_and_logits_equal_the_reference(base: MMaDA) -> None:
    ids = GOLDEN["in.tokens"][:, -NUM_TOKENS - 1 : -1]
    tokens = torch.where(ids == base.special.mask, base.spec.mask_id, ids - base.special.first_code)
    context = base.context(conditions(), guided=True)
    conditional = base.features(tokens[:-1], context, Clock(0, 1))[0]
    unconditional = base.features(tokens[-1:], context.rows(torch.tensor([0])), Clock(0, 1))[1]
    rows = [*conditional, *unconditional]
    lengths = [len(base.prompt_ids(text)) for text in TEXTS] + [len(base.unconditional_ids())]
    for row, length, expected, mask in zip(
        rows, lengths, GOLDEN["out.feature"], GOLDEN["in.tokens_mask"].bool(), strict=True
    ):
        places, is_real = base.interface.row_places(torch.tensor([length]), NUM_TOKENS + 2 + length)
        assert bool(is_real.all())
        in_sequence = row[: places.shape[1]][places[0].argsort()]
        torch.testing.assert_close(in_sequence, expected[mask], rtol=1e-5, atol=1e-5)
    logits = torch.stack([base.interface.logits(row[None, :NUM_TOKENS])[0] for row in rows])
    torch.testing.assert_close(logits, GOLDEN["out.logits"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("run", META["runs"])
def test_greedy_runs_equal_the_reference_token_for_token(base: MMaDA, run: str) -> None:
    num_steps, guidance = META["runs"][run]
    decoding = Decoding(
        num_steps,
        schedule="cosine_each",
        guidance=guidance,
        guidance_course="constant",
        temperature=0,
        confidence_noise=0,
    )
    steps = list(sample(base, conditions(), decoding, Vanilla()))
    golden = (GOLDEN[f"greedy.{run}.{what}"] for what in ("predicted", "still_masked"))
    for step, predicted, masked in zip(steps, *golden, strict=True):
        drawn = guide(base.interface.logits(step.features), guidance).argmax(-1)
        is_known = step.state.tokens != base.spec.mask_id
        assert torch.equal(torch.where(is_known, step.state.tokens, drawn), predicted)
        assert torch.equal(step.tokens == base.spec.mask_id, masked.bool())
    assert torch.equal(steps[-1].tokens, GOLDEN[f"greedy.{run}.tokens"])


@pytest.mark.parametrize("shape", names("counts."))
def test_counts_equal_the_reference(shape: str) -> None:
    num_tokens, num_steps = map(int, shape.split("_n"))
    assert tokens_per_step("cosine_each", num_steps, num_tokens) == GOLDEN[f"counts.{shape}"].tolist()


@pytest.mark.parametrize(
    "name",
    [f"noise_temperature.{n}" for n in names("noise_temperature.")]
    + [f"greedy.{run}.noise_temperature" for run in META["runs"]],
)
def test_noise_falls_as_in_the_reference(name: str) -> None:
    expected = GOLDEN[name]
    decoding = Decoding(len(expected), confidence_noise=META["temperature"], noise_course="product")
    scales = torch.tensor([decoding.noise_at(step) for step in range(len(expected))], dtype=torch.float64)
    torch.testing.assert_close(scales, expected, rtol=1e-9, atol=1e-12)


def test_images_equal_the_reference(base: MMaDA, decoder: CodeDecoder) -> None:
    pixels = decoder.pixels(GOLDEN["in.codes"])
    torch.testing.assert_close(pixels, GOLDEN["out.image"], rtol=1e-5, atol=1e-5)
    shades = (base.decode(GOLDEN["in.codes"]).double() - ((GOLDEN["out.image"] + 1) / 2).clamp(0, 1) * 255).double()
    assert float(shades.max()) < 1e-2  # cut, not rounded
    assert float(shades.min()) > -1
