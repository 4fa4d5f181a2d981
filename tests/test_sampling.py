from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from scipy import stats
from torch import Tensor

from lit_shortcut.acceleration.accelerated import Accelerated, Vanilla
from lit_shortcut.acceleration.plans import Even
from lit_shortcut.acceleration.predictors import Hold
from lit_shortcut.acceleration.shortcut import Shortcut
from lit_shortcut.bases.class_tokens import ClassContext
from lit_shortcut.bases.maskgit.adapter import MaskGIT
from lit_shortcut.contracts import Clock, Conditions, Context, Step, TokenSpec
from lit_shortcut.decoding.halton import halton_order, roll_order, rolled_starts
from lit_shortcut.decoding.noise import uniform
from lit_shortcut.decoding.schedules import Schedule, tokens_per_step
from lit_shortcut.decoding.temperature import TemperatureCourse
from lit_shortcut.interface import TokenInterface
from lit_shortcut.networks.shortcut import ShortcutNet
from lit_shortcut.sampling import Decoding, LogProbs, Order, generate, sample

GOLDEN = json.loads((Path(__file__).parent / "parity" / "schedules.json").read_text())
SHARES = GOLDEN["maskgit_mask_ratio_before_next_step"]
GREEDY = {"temperature": 0.0, "confidence_noise": 0.0}
MakeConditions = Callable[..., Conditions]


class FixedLogits:
    """A base whose logits at each place are given: (G, L, V), whatever the tokens."""

    fingerprint = "fixed"

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits
        _, num_tokens, codebook_size = logits.shape
        self.spec = TokenSpec(num_tokens, num_tokens, codebook_size, codebook_size, codebook_size, num_classes=5)
        self.interface = TokenInterface(num_tokens, torch.eye(codebook_size), torch.eye(codebook_size))

    def context(self, conditions: Conditions, *, guided: bool) -> Context:
        return ClassContext(ids=conditions.labels.expand(1 + guided, -1))

    def features(self, tokens: Tensor, context: Context, clock: Clock) -> Tensor:
        assert isinstance(context, ClassContext)
        branches, count = context.ids.shape
        return self.logits[:branches, None].expand(-1, count, -1, -1)

    def decode(self, tokens: Tensor) -> Tensor:
        raise AssertionError("not used here")


def steps_of(base: Any, conditions: Conditions, **decoding: Any) -> list[Step]:
    return list(sample(base, conditions, Decoding(**decoding), Vanilla()))


@pytest.mark.parametrize("guidance", [0.0, 2.8])
@pytest.mark.parametrize("schedule", get_args(Schedule))
def test_known_tokens_are_never_changed(
    base: MaskGIT, conditions: MakeConditions, schedule: Schedule, guidance: float
) -> None:
    steps = steps_of(base, conditions(3), num_steps=5, schedule=schedule, guidance=guidance)
    assert bool((steps[0].state.tokens == base.spec.mask_id).all())
    for step in steps:
        was_known = step.state.tokens != base.spec.mask_id
        assert torch.equal(step.tokens[was_known], step.state.tokens[was_known])
    for earlier, later in pairwise(steps):
        assert torch.equal(later.state.tokens, earlier.tokens)
        assert later.state.control is earlier.committed
        assert later.state.clock.step == earlier.state.clock.step + 1


@pytest.mark.parametrize("schedule", get_args(Schedule))
@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_counts_follow_the_schedule_until_every_token_is_known(
    base: MaskGIT, conditions: MakeConditions, schedule: Schedule, num_steps: int
) -> None:
    steps = steps_of(base, conditions(3), num_steps=num_steps, schedule=schedule)
    counts = tokens_per_step(schedule, num_steps, base.spec.num_tokens)
    for step, count in zip(steps, counts, strict=True):
        newly = (step.tokens != base.spec.mask_id) & (step.state.tokens == base.spec.mask_id)
        assert newly.sum(1).tolist() == [count] * 3
        assert torch.equal(step.committed.positions.sort(1).values, newly.nonzero()[:, 1].view(3, count))
        assert torch.equal(step.tokens.gather(1, step.committed.positions), step.committed.tokens)
    assert 0 <= steps[-1].tokens.min()
    assert steps[-1].tokens.max() < base.spec.codebook_size


@pytest.mark.parametrize("row", SHARES, ids=lambda row: f"{row['num_steps']}-{row['num_tokens']}")
def test_masked_share_equals_the_reference(conditions: MakeConditions, row: dict[str, Any]) -> None:
    empty = FixedLogits(torch.zeros(1, row["num_tokens"], 2))
    steps = steps_of(empty, conditions(2), num_steps=row["num_steps"], guidance=0.0)
    assert steps[0].state.masked_share.tolist() == [1.0, 1.0]
    assert [step.state.masked_share.tolist() for step in steps[1:]] == [[ratio, ratio] for ratio in row["ratio"]]


@pytest.mark.parametrize("guidance", [0.0, 2.8])
def test_an_image_depends_on_its_seed_and_class_not_on_its_batch(
    base: MaskGIT, conditions: MakeConditions, guidance: float
) -> None:
    everyone, decoding = conditions(5), Decoding(num_steps=5, guidance=guidance)
    together = generate(base, everyone, decoding, Vanilla()).tokens
    for row in range(5):
        alone = generate(base, Conditions(*(field[row : row + 1] for field in everyone)), decoding, Vanilla()).tokens
        assert torch.equal(alone[0], together[row])
    order = torch.tensor([3, 0, 4, 1, 2])
    permuted = generate(base, Conditions(*(field[order] for field in everyone[:3])), decoding, Vanilla()).tokens
    assert torch.equal(permuted, together[order])
    renamed = generate(base, everyone._replace(ids=everyone.ids + 77), decoding, Vanilla()).tokens
    assert torch.equal(renamed, together)


def test_same_seed_gives_the_same_image_and_another_seed_another(base: MaskGIT) -> None:
    seeds = torch.tensor([4, 5, 4, -6, 2**62])
    tokens = generate(base, Conditions(torch.arange(5), seeds, torch.zeros_like(seeds)), Decoding(5), Vanilla()).tokens
    assert torch.equal(tokens[0], tokens[2])
    assert len(tokens.unique(dim=0)) == 4


def test_global_random_state_has_no_part(base: MaskGIT, conditions: MakeConditions) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = generate(base, conditions(2), Decoding(5), Vanilla()).tokens
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(generate(base, conditions(2), Decoding(5), Vanilla()).tokens, first)


def test_default_dtype_has_no_part(base: MaskGIT, conditions: MakeConditions) -> None:
    """Lightning sets it to the precision of the weights while a step runs."""
    network = ShortcutNet(base.spec.width, num_heads=2).eval()
    torch.nn.init.normal_(network.widen.weight, std=0.1)  # one that repeats its input would not tell the time
    acceleration = Accelerated(Even(3), Shortcut(network))
    expected = list(sample(base, conditions(2), Decoding(7), acceleration))
    torch.set_default_dtype(torch.bfloat16)
    try:
        steps = list(sample(base, conditions(2), Decoding(7), acceleration))
    finally:
        torch.set_default_dtype(torch.float32)
    for step, other in zip(steps, expected, strict=True):
        assert torch.equal(step.features, other.features)
        assert torch.equal(step.tokens, other.tokens)
        assert torch.equal(step.state.masked_share, other.state.masked_share)


def test_another_class_changes_its_own_image_alone(base: MaskGIT, conditions: MakeConditions) -> None:
    everyone = conditions(4)
    labels = everyone.labels.clone()
    labels[2] = 4
    before = generate(base, everyone, Decoding(5), Vanilla()).tokens
    after = generate(base, everyone._replace(labels=labels), Decoding(5), Vanilla()).tokens
    assert (before != after).any(1).tolist() == [False, False, True, False]


@pytest.mark.parametrize(("guidance", "branches"), [(0.0, 1), (2.8, 2)])
def test_guidance_decides_the_number_of_branches(
    base: MaskGIT, conditions: MakeConditions, guidance: float, branches: int
) -> None:
    for step in steps_of(base, conditions(2), num_steps=3, guidance=guidance):
        assert step.features.shape[0] == branches


@pytest.mark.parametrize("noise", [0.0, 7.0])
def test_one_step_reveals_the_conditional_branch_own_choice(
    base: MaskGIT, conditions: MakeConditions, noise: float
) -> None:
    (step,) = steps_of(base, conditions(3), num_steps=1, temperature=0.0, confidence_noise=noise)
    context = base.context(conditions(3), guided=False)
    features = base.features(torch.full_like(step.tokens, base.spec.mask_id), context, Clock(0, 1))
    assert torch.equal(step.tokens, base.interface.logits(features)[0].argmax(-1))


def test_without_temperature_and_noise_seeds_have_no_part(base: MaskGIT, conditions: MakeConditions) -> None:
    one, other = (steps_of(base, conditions(4, first_seed=first), num_steps=5, **GREEDY) for first in (0, 10_000))
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a.tokens, b.tokens)
        assert torch.equal(a.committed.positions, b.committed.positions)


def test_most_confident_places_are_committed_first(conditions: MakeConditions) -> None:
    ranks = torch.tensor([5, 2, 7, 0, 3, 6, 1, 4])
    codes = torch.tensor([1, 0, 2, 2, 1, 0, 0, 1])
    logits = torch.nn.functional.one_hot(codes, 3) * (8.0 - ranks)[:, None]  # rank 0 is surest
    steps = steps_of(FixedLogits(logits[None]), conditions(2), num_steps=4, schedule="linear", guidance=0.0, **GREEDY)
    order = torch.cat([step.committed.positions for step in steps], dim=1)
    assert torch.equal(order, ranks.argsort().expand(2, -1))
    assert torch.equal(steps[-1].tokens, codes.expand(2, -1))


def test_guidance_rises_linearly_from_zero(conditions: MakeConditions) -> None:
    """Codes 0..4 win in turn as the weight w of (1 + w)·c − w·u passes 0.5, 1.5, 2.5 and 3.5."""
    conditional = torch.tensor([0.0, -0.5, -2.0, -4.5, -8.0])  # −k²/2, and u falls by one a code
    unconditional = conditional + torch.tensor([0.0, -1.0, -2.0, -3.0, -4.0])
    logits = torch.stack([conditional, unconditional])[:, None].expand(-1, 15, -1)
    steps = steps_of(FixedLogits(logits), conditions(1), num_steps=5, schedule="linear", guidance=4.0, **GREEDY)
    assert [step.committed.tokens.unique().tolist() for step in steps] == [[0], [1], [2], [3], [4]]


def test_constant_guidance_is_the_same_at_every_step(conditions: MakeConditions) -> None:
    """As above, but the code that wins at weight 2 wins throughout."""
    conditional = torch.tensor([0.0, -0.5, -2.0, -4.5, -8.0])
    logits = torch.stack([conditional, conditional - torch.arange(5.0)])[:, None].expand(-1, 15, -1)
    course = {"guidance": 2.0, "guidance_course": "constant"}
    steps = steps_of(FixedLogits(logits), conditions(1), num_steps=5, schedule="linear", **course, **GREEDY)
    assert [step.committed.tokens.unique().tolist() for step in steps] == [[2]] * 5
    assert steps_of(FixedLogits(logits), conditions(1), num_steps=1, **course, **GREEDY)[0].tokens.unique() == 2


def test_constant_noise_orders_the_last_step_too() -> None:
    """Two places a step, of which one is surely first without noise: with much noise each is first half the time."""
    ids = torch.arange(4000)
    logits = torch.tensor([[4.0, 0.0], [3.0, 0.0]])[None]
    course = {"num_steps": 1, "guidance": 0.0, "temperature": 0.0, "confidence_noise": 1e6, "noise_course": "constant"}
    (step,) = steps_of(FixedLogits(logits), Conditions(ids, ids, torch.zeros_like(ids)), **course)
    first = int((step.committed.positions[:, 0] == 0).sum())
    assert stats.binomtest(first, len(ids), 0.5).pvalue > 1e-3


@pytest.mark.parametrize("name", ["guidance_course", "noise_course"])
def test_unknown_course_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be one of linear, constant.*got 'rising'"):
        Decoding(**{name: "rising"})  # type: ignore[arg-type]


def test_a_step_that_commits_nothing_leaves_the_tokens(base: MaskGIT, conditions: MakeConditions) -> None:
    steps = steps_of(base, conditions(2), num_steps=14, schedule="cosine_left")
    counts = tokens_per_step("cosine_left", 14, base.spec.num_tokens)
    assert 0 in counts
    for step, count in zip(steps, counts, strict=True):
        assert step.committed.tokens.shape == (2, count)
        assert torch.equal(step.tokens, step.state.tokens) == (count == 0)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_codes_follow_the_tempered_softmax(temperature: float) -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, 0.4])
    fixed, ids = FixedLogits(logits.expand(1, 4, -1)), torch.arange(5000)
    conditions = Conditions(ids, ids, torch.zeros_like(ids))
    # noise far above any log p: places are chosen regardless of their codes, which leaves the codes' shares alone
    (*_, last) = steps_of(fixed, conditions, num_steps=2, guidance=0.0, temperature=temperature, confidence_noise=1e6)
    for place in range(4):
        counts = torch.bincount(last.tokens[:, place], minlength=4)
        expected = (logits.double() / temperature).softmax(0) * len(ids)
        assert stats.chisquare(counts, expected).pvalue > 1e-3


def test_temperature_course_sharpens_step_by_step(base: MaskGIT, conditions: MakeConditions) -> None:
    def drawn(**changes: Any) -> list[Step]:
        return steps_of(base, conditions(4), num_steps=4, **changes)

    halved = TemperatureCourse(first=2.0, last=2.0)
    for one, other in zip(drawn(temperature=0.5), drawn(temperature_course=halved), strict=True):
        assert torch.equal(one.tokens, other.tokens)
    warm = TemperatureCourse(first=2.0, last=2.0, warmup=1)  # 1 at step 0, then 2
    assert torch.equal(drawn(temperature_course=warm)[0].tokens, drawn()[0].tokens)
    assert not torch.equal(drawn(temperature_course=warm)[-1].tokens, drawn()[-1].tokens)


def test_noise_in_bfloat16_draws_no_improbable_code_and_others_as_often_as_they_should_be() -> None:
    ids = torch.arange(20_000)
    conditions = Conditions(ids, ids, torch.zeros_like(ids))
    logits = torch.tensor([0.0, -1.0, -2.0, *[-9.5] * 40])  # the last together once in 360 draws
    one = {"num_steps": 1, "guidance": 0.0}
    counts = {}
    for dtype in ("float32", "bfloat16"):
        (step,) = steps_of(FixedLogits(logits.expand(1, 1, -1)), conditions, noise_dtype=dtype, **one)
        counts[dtype] = torch.bincount(step.tokens[:, 0], minlength=len(logits))
    assert counts["float32"][3:].sum() > 20
    assert counts["bfloat16"][3:].sum() == 0
    shares = counts["bfloat16"][:3] / len(ids)
    torch.testing.assert_close(shares.double(), logits[:3].double().softmax(0), atol=0.02, rtol=0)


def test_noise_in_bfloat16_belongs_to_the_image(base: MaskGIT, conditions: MakeConditions) -> None:
    decoding: dict[str, Any] = {"num_steps": 4, "noise_dtype": "bfloat16"}
    *_, together = steps_of(base, conditions(3), **decoding)
    everyone = conditions(3)
    for row in range(3):
        *_, alone = steps_of(base, everyone.slice(row, row + 1), **decoding)
        assert torch.equal(alone.tokens[0], together.tokens[row])
    *_, exact = steps_of(base, conditions(3), num_steps=4)
    assert not torch.equal(exact.tokens, together.tokens)


@pytest.mark.parametrize(("name", "value"), [("first", 0.0), ("last", -1.0), ("warmup", -1)])
def test_temperature_course_below_its_bounds_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"temperature_course\.{name}.*{value}"):
        TemperatureCourse(**{name: value})


def test_confidence_noise_orders_the_places_by_chance_and_ends_at_the_last_step() -> None:
    ids = torch.arange(8000)
    conditions = Conditions(ids, ids, torch.zeros_like(ids))
    sure_first = torch.tensor([[4.0, 0.0], [3.0, 0.0], [2.0, 0.0], [1.0, 0.0]])[None]
    greedy = {"num_steps": 4, "schedule": "linear", "guidance": 0.0, "temperature": 0.0}
    noisy = steps_of(FixedLogits(sure_first), conditions, confidence_noise=1e6, **greedy)
    places = torch.bincount(noisy[0].committed.positions[:, 0], minlength=4)
    assert stats.chisquare(places).pvalue > 1e-3
    # Gumbel's trick: with noise of scale s, a place is first with probability softmax(log p / s)
    scale = 0.1
    noisy = steps_of(FixedLogits(sure_first), conditions, confidence_noise=scale, **greedy)
    expected = (sure_first[0].double().log_softmax(-1).amax(-1) / scale).softmax(0) * len(ids)
    assert stats.chisquare(torch.bincount(noisy[0].committed.positions[:, 0], minlength=4), expected).pvalue > 1e-3
    two = {**greedy, "num_steps": 2, "schedule": "square"}  # the last step has no noise left: sure places come first
    last = steps_of(FixedLogits(sure_first), conditions, confidence_noise=1e6, **two)[-1].committed.positions
    assert torch.equal(last, last.sort(1).values)


def test_each_step_draws_noise_of_its_own() -> None:
    """Flat logits, one place a step: what step 0 left undone says nothing about what step 1 does."""
    ids = torch.arange(6000)
    flat, conditions = FixedLogits(torch.zeros(1, 4, 4)), Conditions(ids, ids, torch.zeros_like(ids))
    first, second, *_ = steps_of(flat, conditions, num_steps=4, schedule="linear", guidance=0.0)
    everywhere = torch.arange(4).expand(len(ids), -1)
    ranked = uniform(ids, 1, everywhere).argsort(1, descending=True)
    assert torch.equal(first.committed.positions, ranked[:, :1])
    runner_up = torch.bincount((second.committed.positions == ranked[:, 1:]).long().argmax(1), minlength=3)
    assert stats.chisquare(runner_up).pvalue > 1e-3
    drawn_before = (uniform(ids, 0, everywhere) * 4).long().gather(1, second.committed.positions)
    repeats = int((drawn_before == second.committed.tokens).sum())
    assert stats.binomtest(repeats, len(ids), 1 / 4).pvalue > 1e-3


# ---- Halton order


@pytest.mark.parametrize("guidance", [0.0, 2.8])
def test_halton_reveals_the_places_in_their_order(base: MaskGIT, conditions: MakeConditions, guidance: float) -> None:
    steps = steps_of(base, conditions(3), num_steps=5, guidance=guidance, order="halton")
    places = torch.cat([step.committed.positions for step in steps], dim=1)
    assert torch.equal(places, halton_order(4, 4).expand(3, -1))
    assert [step.committed.tokens.shape[1] for step in steps] == tokens_per_step("arccos", 5, 16)
    assert bool((steps[-1].tokens != base.spec.mask_id).all())


def test_rolled_halton_reveals_every_place_in_the_sample_own_order(base: MaskGIT, conditions: MakeConditions) -> None:
    steps = steps_of(base, conditions(6), num_steps=5, order="halton_rolled")
    places = torch.cat([step.committed.positions for step in steps], dim=1)
    assert torch.equal(places, roll_order(halton_order(4, 4), rolled_starts(conditions(6).seeds, 16)))
    assert len(places.unique(dim=0)) > 1


@pytest.mark.parametrize("order", ["halton", "halton_rolled"])
def test_halton_draws_at_the_first_step_what_confidence_draws_there(
    base: MaskGIT, conditions: MakeConditions, order: Order
) -> None:
    """Where a code is drawn does not depend on which others are: the orders differ in what they commit alone."""
    ours, theirs = (steps_of(base, conditions(3), num_steps=3, order=name)[0] for name in (order, "confidence"))
    everywhere = steps_of(base, conditions(3), num_steps=1, guidance=0.0)[0].tokens
    for step in (ours, theirs):
        assert torch.equal(step.committed.tokens, everywhere.gather(1, step.committed.positions))


@pytest.mark.parametrize("order", ["halton", "halton_rolled"])
def test_an_image_in_halton_order_depends_on_its_seed_and_class_not_on_its_batch(
    base: MaskGIT, conditions: MakeConditions, order: Order
) -> None:
    everyone, decoding = conditions(5), Decoding(num_steps=5, order=order)
    together = generate(base, everyone, decoding, Accelerated(Even(3), Hold())).tokens
    for row in range(5):
        own = Conditions(*(field[row : row + 1] for field in everyone))
        assert torch.equal(generate(base, own, decoding, Accelerated(Even(3), Hold())).tokens[0], together[row])


def test_confidence_noise_has_no_part_in_halton_order(base: MaskGIT, conditions: MakeConditions) -> None:
    one, other = (Decoding(5, order="halton", confidence_noise=noise) for noise in (0.0, 7.0))
    drawn = [generate(base, conditions(3), decoding, Vanilla()).tokens for decoding in (one, other)]
    assert torch.equal(*drawn)


def test_halton_without_a_square_grid_is_refused(conditions: MakeConditions) -> None:
    with pytest.raises(ValueError, match="a square token grid is needed, and num_tokens is 15"):
        steps_of(FixedLogits(torch.zeros(1, 15, 2)), conditions(1), num_steps=2, guidance=0.0, order="halton")


def test_grid_height_that_does_not_divide_the_tokens_is_refused() -> None:
    spec = TokenSpec(15, 15, 2, 2, 2, num_classes=5)
    assert spec._replace(grid_height=5).grid == (5, 3)
    with pytest.raises(ValueError, match="a token grid of 4 rows is needed, and num_tokens is 15"):
        spec._replace(grid_height=4).grid  # noqa: B018


def test_unknown_order_is_refused() -> None:
    with pytest.raises(ValueError, match="order must be one of confidence, halton, halton_rolled; got 'raster'"):
        Decoding(order="raster")  # type: ignore[arg-type]


# ---- bad input


def test_budget_out_of_range_is_refused(base: MaskGIT, conditions: MakeConditions) -> None:
    with pytest.raises(ValueError, match=r"budget must lie in 1\.\.5.*got 6"):
        generate(base, conditions(1), Decoding(5), Accelerated(Even(6), Hold()))


def test_too_many_steps_are_refused(base: MaskGIT, conditions: MakeConditions) -> None:
    with pytest.raises(ValueError, match=r"num_steps must lie in 1\.\.16.*got 17"):
        generate(base, conditions(1), Decoding(17), Vanilla())


def test_wrong_class_is_refused(base: MaskGIT, conditions: MakeConditions) -> None:
    with pytest.raises(ValueError, match=r"class labels must lie in 0\.\.4"):
        generate(base, conditions(1)._replace(labels=torch.tensor([5])), Decoding(5), Vanilla())


@pytest.mark.parametrize("name", ["temperature", "confidence_noise"])
def test_negative_noise_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 0, got -1"):
        Decoding(**{name: -1.0})  # type: ignore[arg-type]


def test_progress_runs_from_zero_to_one() -> None:
    assert [Decoding(num_steps=5).progress(step) for step in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert Decoding(num_steps=1).progress(0) == 0


def test_features_carry_no_gradient_history(base: MaskGIT, conditions: MakeConditions) -> None:
    with torch.enable_grad():
        for step in sample(base, conditions(1), Decoding(3), Vanilla()):
            assert not step.features.requires_grad
            assert torch.is_grad_enabled()  # the loop's own mode does not reach its consumer


@pytest.mark.parametrize("order", ["confidence", "halton_rolled"])
@pytest.mark.parametrize("temperature", [0.7, 0.0])
def test_log_probs_are_those_of_the_accelerated_policy_that_drew_the_tokens(
    base: MaskGIT, conditions: MakeConditions, temperature: float, order: Order
) -> None:
    decoding = Decoding(num_steps=5, temperature=temperature, order=order)
    acceleration = Accelerated(Even(2), Hold())
    log_probs = LogProbs()
    generate(base, conditions(3), decoding, acceleration, on_step=log_probs)
    for step in sample(base, conditions(3), decoding, acceleration):
        conditional, unconditional = base.interface.logits(step.features)
        guidance = decoding.guidance_at(step.state.clock.step)
        logits = (1 + guidance) * conditional - guidance * unconditional
        policy = torch.distributions.Categorical(logits=logits / (temperature or 1))
        expected = policy.log_prob(step.tokens.clamp(max=base.spec.codebook_size - 1))
        places = step.committed.positions
        torch.testing.assert_close(log_probs.gathered().gather(1, places), expected.gather(1, places))


def test_decoding_comes_back_from_its_values() -> None:
    course = TemperatureCourse(first=1.0, last=1.2, power=2.0, warmup=1)
    decoding = Decoding(num_steps=5, guidance=3, order="halton", temperature_course=course)
    assert Decoding.from_values(json.loads(json.dumps(asdict(decoding)))) == decoding
    assert Decoding.from_values({"num_steps": 5}) == Decoding(num_steps=5)


@pytest.mark.parametrize(
    "values",
    [{"temp": 1}, {"guidance": "much"}, {"schedule": 3}, {"temperature_course": {"middle": 1}}, {"order": "odd"}],
)
def test_value_that_is_none_of_a_decoding_is_named(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        Decoding.from_values(values)
