"""Golden tensors of the reference implementation; README.md beside this file says how they were made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lit_shortcut.acceleration.accelerated import Accelerated, Vanilla
from lit_shortcut.acceleration.plans import Even
from lit_shortcut.acceleration.shortcut import Shortcut
from lit_shortcut.bases.clip_text import Encoded, EncodedContext
from lit_shortcut.bases.meissonic.adapter import Meissonic
from lit_shortcut.bases.meissonic.transformer import MeissonicTransformer
from lit_shortcut.contracts import Clock, Conditions
from lit_shortcut.guidance import guide
from lit_shortcut.networks.shortcut import ShortcutNet
from lit_shortcut.published import Names, fill
from lit_shortcut.sampling import Decoding, generate, sample
from lit_shortcut.weights import load_tensors

FILE = Path(__file__).with_name("meissonic_tiny.safetensors")
GOLDEN, META = load_tensors(FILE)
MODELS = {"plain": ("", META["sample_size"]), "resized": ("_resized", META["sample_size_resized"])}
NEGATIVE = "blurry"
PROMPTS = tuple(f"prompt {index}" for index in range(len(GOLDEN["in.encoded_states"]) - 1))
PATCH = 16


def part(prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in GOLDEN.items() if k.startswith(prefix)}


class RecordedStates:
    def encode(self, texts: Sequence[str]) -> Encoded:
        index = [[*PROMPTS, NEGATIVE].index(text) for text in texts]
        return Encoded(GOLDEN["in.encoded_states"][index], GOLDEN["in.encoded_pooled"][index])

    def identity(self) -> dict[str, str]:
        raise AssertionError("not used here")


class NoTokenizer:
    def decode(self, tokens: Tensor) -> Tensor:
        raise AssertionError("not used here")


def make_base(model: str) -> Meissonic:
    suffix, size = MODELS[model]
    sizes = {name: value for name, value in META["transformer"].items() if name != "in_channels"}  # has no meaning
    transformer = MeissonicTransformer(**sizes, downsample=bool(suffix), upsample=bool(suffix))
    fill(transformer, part(f"base{suffix}."), Names([]), FILE)
    pixels = PATCH * size
    return Meissonic(transformer, NoTokenizer(), RecordedStates(), height=pixels, width=pixels, negative=NEGATIVE)


@pytest.fixture(scope="module")
def bases() -> dict[str, Meissonic]:
    return {model: make_base(model) for model in MODELS}


def context_of(suffix: str) -> EncodedContext:
    return EncodedContext(
        states=GOLDEN["in.encoded_states"][None],
        pooled=GOLDEN["in.encoded_pooled"][None],
        micro_conds=GOLDEN[f"in{suffix}.micro_conds"][None],
    )


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("moment", "later"), [(0, ""), (1, "_later")])
def test_features_and_logits_equal_the_reference(
    bases: dict[str, Meissonic], model: str, moment: int, later: str
) -> None:
    base, suffix, steps_left = bases[model], MODELS[model][0], META["timesteps"][moment]
    assert base.spec.mask_id == META["mask"]
    tokens = GOLDEN[f"in{suffix}.tokens"].flatten(1)
    features = base.features(tokens, context_of(suffix), Clock(2, steps_left + 3))[0]
    logits = base.interface.logits(features)
    torch.testing.assert_close(logits, GOLDEN[f"out{suffix}.logits{later}"], rtol=1e-5, atol=1e-5)
    if not later:
        torch.testing.assert_close(features, GOLDEN[f"out{suffix}.feature_compact"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model", MODELS)
def test_rows_before_the_head_are_those_of_the_reference(bases: dict[str, Meissonic], model: str) -> None:
    base, suffix = bases[model], MODELS[model][0]
    behind_norm = GOLDEN[f"out{suffix}.feature"]
    logits = behind_norm @ base.interface.head_weight.T
    torch.testing.assert_close(logits, GOLDEN[f"out{suffix}.logits"], rtol=1e-5, atol=1e-5)
    compact = GOLDEN[f"out{suffix}.feature_compact"]
    assert compact.shape[1] == base.interface.num_rows
    torch.testing.assert_close(base.interface.logits(compact), logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("moment", "later"), [(0, ""), (1, "_later")])
def test_time_is_embedded_as_by_the_reference(bases: dict[str, Meissonic], model: str, moment: int, later: str) -> None:
    suffix = MODELS[model][0]
    pooled, micro_conds = GOLDEN["in.encoded_pooled"], GOLDEN[f"in{suffix}.micro_conds"]
    timestep = torch.tensor([META["timesteps"][moment]])
    condition = bases[model].transformer.condition(timestep, pooled, micro_conds, torch.float32)
    torch.testing.assert_close(condition, GOLDEN[f"out{suffix}.temb{later}"], rtol=1e-5, atol=1e-5)


def test_time_is_rounded_to_the_transformers_precision() -> None:
    transformer = make_base("plain").transformer.bfloat16()
    pooled, micro_conds = GOLDEN["in.encoded_pooled"].bfloat16(), GOLDEN["in.micro_conds"].bfloat16()
    seen = []
    transformer.time_text_embed.time_proj.register_forward_hook(lambda _, args, out: seen.append(args[0]))
    transformer.condition(torch.tensor([63]), pooled, micro_conds, torch.bfloat16)
    assert seen[0].tolist() == [62_976]


def prompted() -> Conditions:
    numbers = torch.arange(len(PROMPTS))
    return Conditions(numbers, numbers, numbers, PROMPTS)


def greedy(num_steps: int, scale: float) -> Decoding:
    """The reference's guidance is s = 1 + w; its scheduler's Gumbel noise is left out."""
    return Decoding(
        num_steps, "cosine_each", guidance=scale - 1, guidance_course="constant", temperature=0, confidence_noise=0
    )


@pytest.mark.parametrize("run", META["runs"])
def test_greedy_runs_equal_the_reference_token_for_token(bases: dict[str, Meissonic], run: str) -> None:
    model, num_steps, scale = META["runs"][run]
    base, golden, decoding = bases[model], part(f"greedy.{run}."), greedy(num_steps, scale)
    context = base.context(prompted(), guided=True)
    assert isinstance(context, EncodedContext)
    assert torch.equal(context.micro_conds, golden["micro_conds"].expand(2, len(PROMPTS), -1))
    steps = list(sample(base, prompted(), decoding, Vanilla()))
    assert len(steps) == num_steps
    for step, predicted, masked in zip(steps, golden["predicted"], golden["still_masked"], strict=True):
        before = step.state.tokens
        best = guide(base.interface.logits(step.features), decoding.guidance).argmax(-1)
        assert torch.equal(torch.where(before == base.spec.mask_id, best, before), predicted)
        assert torch.equal(step.tokens == base.spec.mask_id, masked.bool())
    assert torch.equal(steps[-1].tokens, golden["tokens"])


@pytest.mark.parametrize("model", MODELS)
def test_shortcut_with_a_full_budget_equals_vanilla(bases: dict[str, Meissonic], model: str) -> None:
    base = bases[model]
    network = ShortcutNet(base.spec.width, num_heads=2, grid=base.spec.grid[0], reach=2, stride=base.transformer.stride)
    wanted = generate(base, prompted(), greedy(6, 5.0), Vanilla()).tokens
    assert torch.equal(
        generate(base, prompted(), greedy(6, 5.0), Accelerated(Even(6), Shortcut(network))).tokens, wanted
    )
    tokens, full_steps = generate(base, prompted(), greedy(6, 5.0), Accelerated(Even(3), Shortcut(network)))
    assert full_steps.tolist() == [3] * len(PROMPTS)
    assert bool((tokens < base.spec.codebook_size).all())
