from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from lit_shortcut.acceleration.accelerated import Accelerated, Predictor, Vanilla
from lit_shortcut.acceleration.plans import Adaptive, Even, Steps
from lit_shortcut.acceleration.predictors import Hold, Taylor
from lit_shortcut.acceleration.replay import RecordedEnds, Replay, replayed
from lit_shortcut.acceleration.shortcut import Shortcut
from lit_shortcut.bases.dimoo.adapter import DiMOO
from lit_shortcut.bases.maskgit.adapter import MaskGIT
from lit_shortcut.contracts import Conditions, MaskedImageModel
from lit_shortcut.guidance import guide
from lit_shortcut.metrics.functional import head_kl
from lit_shortcut.networks.llada_shortcut import LLaDAShortcutNet
from lit_shortcut.networks.shortcut import ShortcutNet, ShortcutNetwork
from lit_shortcut.sampling import Decoding, sample
from lit_shortcut.tasks.recording import record
from tests.acceleration.recorded import COUNTS, ENDS, GUIDANCE, NUM_STEPS, network, replay, trajectories

MakeConditions = Callable[..., Conditions]


@pytest.mark.parametrize("predictor", [Hold(), Taylor(1), Taylor(2), Shortcut(network())])
def test_full_budget_loses_nothing(predictor: Predictor) -> None:
    found = replayed(replay(), {"": Accelerated(Even(NUM_STEPS), predictor)})[""]
    assert found.kl.tolist() == [0] * 5
    assert found.full_steps.tolist() == [NUM_STEPS] * 5


def test_kl_is_that_of_the_guided_heads_where_tokens_were_committed() -> None:
    """Hold from step 2 on, by hand."""
    recorded = trajectories()
    expected = torch.zeros(5)
    for step in range(NUM_STEPS):
        held = [0, 0, 2, 2, 2, 2][step]
        for row in range(5):
            places = (recorded.committed_at[row] == step).nonzero()[:, 0]
            truth, guess = (
                guide(ENDS.interface.logits(recorded.features[row, :, at, None], places[None]), GUIDANCE[step])
                for at in (step, held)
            )
            expected[row] += head_kl(truth, guess).sum()
    found = replayed(replay(), {"": Accelerated(Steps([0, 2]), Hold())})[""]
    torch.testing.assert_close(found.kl, expected, rtol=1e-4, atol=1e-5)


def test_replaying_per_sample_decides_as_replaying_each_sample_by_itself() -> None:
    recorded, method = trajectories(), Accelerated(Adaptive(0.5, per="sample"), Shortcut(network()))
    together = replayed(Replay(ENDS, recorded, GUIDANCE), {"": method})[""]
    assert len(together.full_steps.unique()) > 1
    for row in range(5):
        own = recorded._replace(
            conditions=recorded.conditions,
            **{n: getattr(recorded, n)[row : row + 1] for n in ("features", "tokens", "committed_at")},
        )
        single = replayed(Replay(ENDS, own, GUIDANCE), {"": method})[""]
        assert single.full_steps[0] == together.full_steps[row]
        torch.testing.assert_close(single.kl[0], together.kl[row], rtol=1e-4, atol=1e-5)


def test_shares_and_sums_are_float32_whatever_the_default() -> None:
    """Lightning's bf16-true makes new tensors bfloat16 during a step."""
    method, recorded = Accelerated(Even(2), Shortcut(network())), replay()
    expected, shares = replayed(recorded, {"": method})[""], [state.masked_share for state in recorded.states()]
    torch.set_default_dtype(torch.bfloat16)
    try:
        found, again = replayed(recorded, {"": method})[""], [state.masked_share for state in recorded.states()]
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found.kl, expected.kl)
    assert all(map(torch.equal, again, shares))


@pytest.fixture(params=["maskgit", "dimoo"])
def recording(
    request: pytest.FixtureRequest, base: MaskGIT, dimoo: DiMOO, conditions: MakeConditions, prompted: MakeConditions
) -> tuple[MaskedImageModel, Conditions, ShortcutNetwork]:
    made: ShortcutNetwork
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        if request.param == "maskgit":
            made = ShortcutNet(32, num_heads=2)
        else:
            made = LLaDAShortcutNet(16, num_heads=2, mlp_width=32)
        for parameter in made.widen.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    model: MaskedImageModel = base if request.param == "maskgit" else dimoo
    return model, (conditions if request.param == "maskgit" else prompted)(4), made.eval().requires_grad_(False)


def test_replay_sees_the_states_and_features_of_the_recorded_run(
    recording: tuple[MaskedImageModel, Conditions, ShortcutNetwork],
) -> None:
    base, conditions, _ = recording
    decoding = Decoding(5, guidance=2.0)
    run = list(sample(base, conditions, decoding, Vanilla()))
    recorded = Replay(
        RecordedEnds(base.spec, base.interface, base.fingerprint),
        record(base, conditions, decoding),
        decoding.guidance_by_step,
    )
    for one, (state, features) in zip(run, recorded.steps(), strict=True):
        assert state.clock == one.state.clock
        assert torch.equal(state.tokens, one.state.tokens)
        assert torch.equal(state.masked.sort(1).values, one.state.masked.sort(1).values)
        assert torch.equal(state.masked_share, one.state.masked_share)
        assert set(zip(*(part.flatten().tolist() for part in state.control[:2]), strict=True)) == set(
            zip(*(part.flatten().tolist() for part in one.state.control[:2]), strict=True)
        )
        assert torch.equal(features, one.features)


def test_replayed_shortcut_predicts_what_sampling_does_while_tokens_agree(
    recording: tuple[MaskedImageModel, Conditions, ShortcutNetwork],
) -> None:
    base, conditions, made = recording
    decoding = Decoding(5, guidance=2.0)
    method = Accelerated(Even(1), Shortcut(made))
    _, sampled, *_ = sample(base, conditions, decoding, method)
    recorded = Replay(
        RecordedEnds(base.spec, base.interface, base.fingerprint),
        record(base, conditions, decoding),
        decoding.guidance_by_step,
    )
    run = method.start(recorded, recorded.recorded, recorded.counts)
    first, second, *_ = recorded.states()
    run(first)
    torch.testing.assert_close(run(second)[0], sampled.features, rtol=1e-4, atol=1e-5)


def test_counts_are_those_of_the_recorded_run() -> None:
    assert replay().counts == COUNTS


def test_replay_keeps_one_step_of_features() -> None:
    recorded = replay()
    for state, features in recorded.steps():
        again = recorded.features(state.tokens, replace(recorded.recorded), state.clock)
        assert torch.equal(again, features)
        assert recorded._loaded is not None
        assert recorded._loaded[0] == state.clock.step
