"""Every acceleration answers the same questions."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from lit_shortcut.acceleration.accelerated import Accelerated, Vanilla
from lit_shortcut.acceleration.plans import Adaptive, Even
from lit_shortcut.acceleration.predictors import Hold, Taylor
from lit_shortcut.acceleration.shortcut import Shortcut
from lit_shortcut.bases.maskgit.adapter import MaskGIT
from lit_shortcut.contracts import Acceleration, Clock, Conditions, Context, Step
from lit_shortcut.networks.shortcut import ShortcutNet
from lit_shortcut.sampling import Decoding, generate, sample
from lit_shortcut.weights import WeightsError

NUM_STEPS = 6
Accelerate = Callable[[int], Acceleration]
MakeConditions = Callable[..., Conditions]


def trained(width: int, **options: Any) -> ShortcutNet:
    """A shortcut that predicts something else than its input."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        network = ShortcutNet(width, num_heads=2, **options)
        assert isinstance(network.widen, nn.Linear)
        nn.init.normal_(network.widen.weight, std=0.1)
    return network.eval().requires_grad_(False)


ACCELERATIONS: dict[str, Accelerate] = {
    "hold": lambda budget: Accelerated(Even(budget), Hold()),
    "taylor 1": lambda budget: Accelerated(Even(budget), Taylor(1)),
    "taylor 2": lambda budget: Accelerated(Even(budget), Taylor(2)),
    "shortcut": lambda budget: Accelerated(Even(budget), Shortcut(trained(32))),
    "shortcut of masked rows": lambda budget: Accelerated(Even(budget), Shortcut(trained(32, rows="masked"))),
    "anchored shortcut": lambda budget: Accelerated(Even(budget), Shortcut(trained(32, anchored=True))),
    "guided shortcut": lambda budget: Accelerated(Even(budget), Shortcut(trained(32, anchored=True, guided=True))),
}


@pytest.fixture(params=ACCELERATIONS)
def accelerate(request: pytest.FixtureRequest) -> Accelerate:
    return ACCELERATIONS[request.param]


@pytest.fixture(params=[{"guidance": 0.0}, {}, {"order": "halton_rolled"}], ids=["unguided", "guided", "halton"])
def decoding(request: pytest.FixtureRequest) -> Decoding:
    return Decoding(num_steps=NUM_STEPS, **request.param)


def same_steps(ours: list[Step], theirs: list[Step]) -> bool:
    return len(ours) == len(theirs) and all(
        a.is_full == b.is_full and torch.equal(a.features, b.features) and torch.equal(a.tokens, b.tokens)
        for a, b in zip(ours, theirs, strict=True)
    )


def test_full_budget_equals_vanilla(
    accelerate: Accelerate, base: MaskGIT, conditions: MakeConditions, decoding: Decoding
) -> None:
    vanilla = list(sample(base, conditions(3), decoding, Vanilla()))
    assert all(step.is_full for step in vanilla)
    assert same_steps(list(sample(base, conditions(3), decoding, accelerate(NUM_STEPS))), vanilla)


@pytest.mark.parametrize("budget", range(1, NUM_STEPS + 1))
def test_base_runs_exactly_as_often_as_the_budget_says(
    accelerate: Accelerate,
    base: MaskGIT,
    conditions: MakeConditions,
    decoding: Decoding,
    budget: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    passes: list[Tensor] = []
    expensive = base.features

    def counted(tokens: Tensor, context: Context, clock: Clock) -> Tensor:
        passes.append(tokens)
        return expensive(tokens, context, clock)

    monkeypatch.setattr(base, "features", counted)
    steps = list(sample(base, conditions(2), decoding, accelerate(budget)))
    assert steps[0].is_full
    assert sum(step.is_full for step in steps) == len(passes) == budget
    for step, tokens in zip([step for step in steps if step.is_full], passes, strict=True):
        assert torch.equal(step.state.tokens, tokens)


def test_full_steps_hand_out_the_base_own_features(
    accelerate: Accelerate, base: MaskGIT, conditions: MakeConditions, decoding: Decoding
) -> None:
    context = base.context(conditions(2), guided=decoding.is_guided)
    for step in sample(base, conditions(2), decoding, accelerate(3)):
        truth = base.features(step.state.tokens, context, Clock(0, 1))
        assert torch.equal(step.features, truth) == step.is_full


def test_features_keep_shape_and_dtype(
    accelerate: Accelerate, base: MaskGIT, conditions: MakeConditions, decoding: Decoding
) -> None:
    branches = 2 if decoding.guidance else 1
    expected = (branches, 3, base.spec.sequence_length, base.spec.width)
    for step in sample(base, conditions(3), decoding, accelerate(2)):
        assert step.features.shape == expected
        assert step.features.dtype == torch.float32
        assert bool(step.features.isfinite().all())


def test_nothing_leaks_from_one_batch_to_the_next(
    accelerate: Accelerate, base: MaskGIT, conditions: MakeConditions, decoding: Decoding
) -> None:
    batches = [conditions(3), conditions(2, first_seed=900)]
    alone = [list(sample(base, batch, decoding, accelerate(2))) for batch in batches]
    acceleration = accelerate(2)
    one_after_the_other = [list(sample(base, batch, decoding, acceleration)) for batch in batches]
    in_turn = list(zip(*(sample(base, batch, decoding, acceleration) for batch in batches), strict=True))
    for index, steps in enumerate(alone):
        assert same_steps(one_after_the_other[index], steps)
        assert same_steps([pair[index] for pair in in_turn], steps)


def test_features_handed_out_are_never_changed_later(
    accelerate: Accelerate, base: MaskGIT, conditions: MakeConditions, decoding: Decoding
) -> None:
    steps = []
    copies = []
    for step in sample(base, conditions(2), decoding, accelerate(3)):
        steps.append(step)
        copies.append((step.features.clone(), step.tokens.clone(), step.state.tokens.clone()))
    for step, (features, tokens, before) in zip(steps, copies, strict=True):
        assert torch.equal(step.features, features)
        assert torch.equal(step.tokens, tokens)
        assert torch.equal(step.state.tokens, before)


def test_an_image_depends_on_its_seed_and_class_not_on_its_batch(
    accelerate: Accelerate, base: MaskGIT, conditions: MakeConditions, decoding: Decoding
) -> None:
    everyone = conditions(5)
    *_, last = sample(base, everyone, decoding, accelerate(2))
    for row in range(5):
        *_, alone = sample(base, Conditions(*(field[row : row + 1] for field in everyone)), decoding, accelerate(2))
        assert torch.equal(alone.tokens[0], last.tokens[row])


def test_budget_above_the_number_of_steps_is_refused(
    accelerate: Accelerate, base: MaskGIT, conditions: MakeConditions, decoding: Decoding
) -> None:
    with pytest.raises(ValueError, match=rf"budget must lie in 1\.\.{NUM_STEPS}"):
        next(sample(base, conditions(1), decoding, accelerate(NUM_STEPS + 1)))


@pytest.mark.parametrize("name", ACCELERATIONS)
def test_identity_names_method_and_budget(name: str) -> None:
    identity = ACCELERATIONS[name](3).identity()
    assert identity["method"] in name
    assert identity["budget"] == 3


def adaptive(threshold: float, per: Literal["sample", "batch"] = "sample", max_gap: int | None = None) -> Accelerated:
    return Accelerated(Adaptive(threshold, per, max_gap), Hold())


def test_plan_that_decides_by_sample_runs_the_base_on_those_samples(
    base: MaskGIT, conditions: MakeConditions, decoding: Decoding
) -> None:
    everyone = conditions(6)
    context = base.context(everyone, guided=decoding.is_guided)
    decisions = []
    for step in sample(base, everyone, decoding, adaptive(1e-9, max_gap=2)):
        truth = base.features(step.state.tokens, context, step.state.clock)
        is_full = torch.as_tensor(step.is_full).expand(6)
        decisions.append(is_full)
        torch.testing.assert_close(step.features[:, is_full], truth[:, is_full], rtol=1e-5, atol=1e-5)
    generated = generate(base, everyone, decoding, adaptive(1e-9, max_gap=2))
    assert torch.equal(generated.full_steps, torch.stack(decisions).sum(0))


def test_adaptive_plan_gives_each_sample_what_it_gets_in_a_batch_of_its_own(
    base: MaskGIT, conditions: MakeConditions, decoding: Decoding
) -> None:
    everyone = conditions(5)
    together = generate(base, everyone, decoding, adaptive(0.15))
    for row in range(5):
        one = Conditions(*(field[row : row + 1] for field in everyone))
        single = generate(base, one, decoding, adaptive(0.15))
        assert torch.equal(single.tokens[0], together.tokens[row])
        assert int(single.full_steps) == int(together.full_steps[row])


def test_adaptive_plan_runs_between_once_and_always(
    base: MaskGIT, conditions: MakeConditions, decoding: Decoding
) -> None:
    never = generate(base, conditions(2), decoding, adaptive(1e9, "batch"))
    at_gaps = generate(base, conditions(2), decoding, adaptive(1e9, "batch", max_gap=1))
    assert never.full_steps.tolist() == [1, 1]
    assert at_gaps.full_steps.tolist() == [NUM_STEPS // 2] * 2


def test_adaptive_plan_by_sample_refuses_predictors_with_a_memory(base: MaskGIT, conditions: MakeConditions) -> None:
    with pytest.raises(ValueError, match="Taylor has memory 2"):
        next(sample(base, conditions(1), Decoding(NUM_STEPS), Accelerated(Adaptive(0.1, "sample"), Taylor(1))))


def test_vanilla_has_a_name_and_no_budget() -> None:
    assert Vanilla().identity() == {"method": "vanilla"}


def test_untrained_shortcut_equals_hold(base: MaskGIT, conditions: MakeConditions, decoding: Decoding) -> None:
    untrained = Accelerated(Even(2), Shortcut(ShortcutNet(base.spec.width, num_heads=2).eval()))
    held = list(sample(base, conditions(2), decoding, Accelerated(Even(2), Hold())))
    assert same_steps(list(sample(base, conditions(2), decoding, untrained)), held)


def test_shortcut_sees_the_tokens_just_committed_and_the_share_left(
    base: MaskGIT, conditions: MakeConditions, decoding: Decoding
) -> None:
    network = trained(base.spec.width)
    steps = list(sample(base, conditions(2), decoding, Accelerated(Even(1), Shortcut(network))))
    for before, step in pairwise(steps):
        control = base.interface.embed(before.committed.tokens, before.committed.positions)
        share = (before.tokens == base.spec.mask_id).float().mean(1)
        for branch, features in enumerate(step.features):  # both branches take the same control
            expected = network(before.features[branch], control, share)
            torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)


def test_shortcut_of_another_base_is_refused(base: MaskGIT, conditions: MakeConditions, decoding: Decoding) -> None:
    def first_step(base_fingerprint: str) -> Step:
        shortcut = Shortcut(trained(base.spec.width), base_fingerprint)
        return next(sample(base, conditions(1), decoding, Accelerated(Even(2), shortcut)))

    assert first_step(base.fingerprint).is_full
    with pytest.raises(WeightsError, match=f"base 0123456789abcdef.*base {base.fingerprint}"):
        first_step("0123456789abcdef")
