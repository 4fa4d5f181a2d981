"""Golden tensors of the reference implementation; README.md beside this file says how they were made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UVit2DModel, VQModel
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from lit_shortcut.acceleration.accelerated import Vanilla
from lit_shortcut.bases.amused import AMUSEd
from lit_shortcut.bases.clip_text import CLIPText, EncodedContext
from lit_shortcut.bases.vq import VQDecoder
from lit_shortcut.contracts import Clock, Conditions
from lit_shortcut.decoding.schedules import tokens_per_step
from lit_shortcut.guidance import guide
from lit_shortcut.sampling import Decoding, sample
from lit_shortcut.weights import load_tensors

GOLDEN, META = load_tensors(Path(__file__).with_name("amused_tiny.safetensors"))
FIRST = Clock(0, 12)
MODELS = {"plain": ("", META["sample_size"]), "resized": ("_resized", META["sample_size_resized"])}
PROMPTS = tuple(f"prompt {index}" for index in range(len(GOLDEN["in.prompt_ids"])))
NEGATIVE = "nothing"


def part(prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in GOLDEN.items() if k.startswith(prefix)}


class RecordedIds:
    def ids(self, texts: Sequence[str], length: int) -> Tensor:
        known = dict(zip(PROMPTS, GOLDEN["in.prompt_ids"], strict=True)) | {NEGATIVE: GOLDEN["in.empty_ids"][0]}
        return torch.stack([known[text] for text in texts])[:, :length]

    def identity(self) -> str:
        raise AssertionError("not used here")


@pytest.fixture(scope="module")
def decoder() -> VQDecoder:
    vqvae = VQModel(**META["vq"])
    missing, unknown = vqvae.load_state_dict(part("vq."), strict=False)
    assert not unknown
    assert all(name.startswith(("encoder.", "quant_conv.")) for name in missing)
    return VQDecoder(vqvae, *GOLDEN["in.codes"].shape[1:])


@pytest.fixture(scope="module")
def text_encoder() -> CLIPText:
    model = CLIPTextModelWithProjection(CLIPTextConfig(**META["clip"]))
    model.load_state_dict(part("clip."))
    return CLIPText(model, RecordedIds())


@pytest.fixture(scope="module")
def bases(decoder: VQDecoder, text_encoder: CLIPText) -> dict[str, AMUSEd]:
    made = {}
    for name, (suffix, size) in MODELS.items():
        transformer = UVit2DModel(**META["unet"], sample_size=size, downsample=bool(suffix), upsample=bool(suffix))
        transformer.load_state_dict(part(f"base{suffix}."))
        scale = META["vae_scale"]
        made[name] = AMUSEd(transformer, decoder, text_encoder, patch_size=scale, negative=NEGATIVE)
    return made


def prompted() -> Conditions:
    numbers = torch.arange(len(PROMPTS))
    return Conditions(numbers, numbers, numbers, PROMPTS)


def test_mask_and_sizes_are_those_of_the_reference(bases: dict[str, AMUSEd]) -> None:
    for name, (_, size) in MODELS.items():
        assert bases[name].spec.mask_id == META["mask"]
        assert bases[name].spec.grid == (size, size)


@pytest.mark.parametrize("model", MODELS)
def test_prompts_are_encoded_as_by_the_reference(bases: dict[str, AMUSEd], model: str) -> None:
    context = bases[model].context(prompted(), guided=True)
    assert isinstance(context, EncodedContext)
    for found, name in ((context.states, "encoded_states"), (context.pooled, "encoded_pooled")):
        expected = GOLDEN[f"out.{name}"]
        torch.testing.assert_close(found[0], expected[:-1], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[1], expected[-1:].expand_as(found[1]), rtol=1e-5, atol=1e-5)
    run = next(run for run, (of, *_) in META["runs"].items() if of == model)
    assert torch.equal(context.micro_conds, GOLDEN[f"greedy.{run}.micro_conds"].expand(2, len(PROMPTS), -1))
    unguided = bases[model].context(prompted(), guided=False)
    assert isinstance(unguided, EncodedContext)
    torch.testing.assert_close(unguided.states[0], context.states[0])
    assert len(unguided.states) == len(unguided.pooled) == len(unguided.micro_conds) == 1


@pytest.mark.parametrize("model", MODELS)
def test_features_and_logits_equal_the_reference(bases: dict[str, AMUSEd], model: str) -> None:
    base, suffix = bases[model], MODELS[model][0]
    tokens, micro_conds = GOLDEN[f"in{suffix}.tokens"].flatten(1), GOLDEN[f"in{suffix}.micro_conds"]
    context = EncodedContext(
        states=GOLDEN["out.encoded_states"][None],
        pooled=GOLDEN["out.encoded_pooled"][None],
        micro_conds=micro_conds[None],
    )
    features = base.features(tokens, context, FIRST)[0]
    torch.testing.assert_close(features, GOLDEN[f"out{suffix}.feature"], rtol=1e-5, atol=1e-5)
    logits = base.interface.logits(features)
    torch.testing.assert_close(logits, GOLDEN[f"out{suffix}.logits"], rtol=1e-5, atol=1e-5)


def test_micro_conditions_are_embedded_as_by_the_reference(bases: dict[str, AMUSEd]) -> None:
    transformer, values = bases["plain"].transformer, GOLDEN["in.micro_values"].flatten()
    for name, width in (("micro_embedding", META["unet"]["micro_cond_encode_dim"]), ("micro_embedding_256", 256)):
        embedded = get_timestep_embedding(values, width, flip_sin_to_cos=True, downscale_freq_shift=0)
        expected = GOLDEN[f"out.{name}"]
        torch.testing.assert_close(embedded.view_as(expected), expected, rtol=1e-5, atol=1e-5)
    embedded = GOLDEN["out.micro_embedding"]
    both = torch.cat([GOLDEN["out.encoded_pooled"][:1].expand(len(embedded), -1), embedded], dim=1)
    torch.testing.assert_close(transformer.cond_embed(both), GOLDEN["out.condition"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("run", META["runs"])
def test_greedy_runs_equal_the_reference_token_for_token(bases: dict[str, AMUSEd], run: str) -> None:
    model, num_steps, scale = META["runs"][run]
    base, golden = bases[model], part(f"greedy.{run}.")
    decoding = greedy(num_steps, scale)
    steps = list(sample(base, prompted(), decoding, Vanilla()))
    assert len(steps) == num_steps
    for step, predicted, masked in zip(steps, golden["predicted"], golden["still_masked"], strict=True):
        before = step.state.tokens
        best = guide(base.interface.logits(step.features), decoding.guidance).argmax(-1)
        assert torch.equal(torch.where(before == base.spec.mask_id, best, before), predicted)
        assert torch.equal(step.tokens == base.spec.mask_id, masked.bool())
    assert torch.equal(steps[-1].tokens, golden["tokens"])


def greedy(num_steps: int, scale: float) -> Decoding:
    """The reference's guidance is s = 1 + w; its scheduler's Gumbel noise is left out."""
    options: dict[str, Any] = {"schedule": "cosine_each", "guidance_course": "constant"}
    return Decoding(num_steps, guidance=scale - 1, temperature=0, confidence_noise=0, **options)


@pytest.mark.parametrize("case", part("counts."))
def test_counts_equal_those_of_the_scheduler(case: str) -> None:
    num_tokens, num_steps = (int(number) for number in case.split("_n"))
    assert tokens_per_step("cosine_each", num_steps, num_tokens) == GOLDEN[f"counts.{case}"].tolist()


def test_noise_on_confidences_falls_as_in_the_scheduler() -> None:
    found = {name: golden for name, golden in part("temperature.").items() if name.count("_") == 2}  # to a number
    assert found
    for name, golden in found.items():
        start, end, num_steps = name.replace("_n", "_").split("_")
        assert float(end) == 0
        decoding = Decoding(int(num_steps), confidence_noise=float(start))
        scales = torch.tensor([decoding.noise_at(step) for step in range(decoding.num_steps)])
        torch.testing.assert_close(scales, golden.float(), rtol=1e-5, atol=1e-5)


def test_decoded_images_equal_the_reference(decoder: VQDecoder) -> None:
    codes = GOLDEN["in.codes"].flatten(1)
    torch.testing.assert_close(decoder.pixels(codes), GOLDEN["out.image"], rtol=1e-5, atol=1e-5)
    expected = (GOLDEN["out.image"].clamp(0, 1) * 255).round()
    assert (decoder.decode(codes).float() - expected).abs().max() <= 1
