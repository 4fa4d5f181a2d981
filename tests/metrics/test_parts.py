from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lit_shortcut.acceleration.accelerated import Accelerated, Past, PredictFn, Vanilla
from lit_shortcut.acceleration.plans import Even
from lit_shortcut.acceleration.predictors import Hold
from lit_shortcut.bases.maskgit.adapter import MaskGIT
from lit_shortcut.contracts import Acceleration, Clock, Conditions, Context, MaskedImageModel, State
from lit_shortcut.metrics.parts import Laps, Part, TimedAcceleration, TimedBase, parts_of, summary
from lit_shortcut.sampling import Decoding, generate, sample

CPU = torch.device("cpu")
MakeConditions = Callable[..., Conditions]


class Watch:
    """Moves when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class SlowHold(Hold):
    """Takes two seconds a step."""

    def __init__(self, clock: Watch) -> None:
        self.clock = clock

    def start(self, base: MaskedImageModel, context: Context) -> PredictFn:
        def predict(past: Past, state: State) -> Tensor:
            self.clock.now += 2
            return past.latest

        return predict


@pytest.fixture
def clock() -> Watch:
    return Watch()


@pytest.fixture
def slow_base(make_base: Callable[[int], MaskGIT], clock: Watch, monkeypatch: pytest.MonkeyPatch) -> MaskGIT:
    """Ten seconds a pass, half a second a head."""
    base = make_base(0)
    features, logits = base.features, base.interface.row_logits

    def slow_features(tokens: Tensor, context: Context, at: Clock) -> Tensor:
        clock.now += 10
        return features(tokens, context, at)

    def slow_logits(rows: Tensor, positions: Tensor) -> Tensor:
        clock.now += 0.5
        return logits(rows, positions)

    monkeypatch.setattr(base, "features", slow_features)
    monkeypatch.setattr(base.interface, "row_logits", slow_logits)
    return base


def run(base: MaskGIT, conditions: Conditions, acceleration: Acceleration, clock: Watch) -> tuple[Laps, Tensor]:
    laps = Laps(CPU, clock)
    for step in sample(TimedBase(base, laps), conditions, Decoding(5), TimedAcceleration(acceleration, laps)):
        clock.now += 0.25  # as a part of the loop between head and the end of the step would
        laps.end("token choice", calls=1)
        tokens = step.tokens
    laps.end("rest")
    return laps, tokens


def test_each_part_gets_its_time_and_calls_and_nothing_is_lost(
    slow_base: MaskGIT, conditions: MakeConditions, clock: Watch
) -> None:
    laps, _ = run(slow_base, conditions(2), Accelerated(Even(2), SlowHold(clock)), clock)
    assert laps.seconds == {"base": 20.0, "hold": 6.0, "head": 2.5, "token choice": 1.25, "rest": 0.0}
    assert {name: calls for name, calls in laps.calls.items() if calls} == {
        "base": 2,
        "hold": 3,
        "head": 5,
        "token choice": 5,
    }
    assert sum(laps.seconds.values()) == clock.now


def test_vanilla_has_no_part_of_its_own(slow_base: MaskGIT, conditions: MakeConditions, clock: Watch) -> None:
    laps, _ = run(slow_base, conditions(2), Vanilla(), clock)
    assert set(laps.seconds) == {"base", "head", "token choice", "rest"}
    assert laps.calls["base"] == 5


@pytest.mark.parametrize("acceleration", [Vanilla(), Accelerated(Even(2), Hold())], ids=["vanilla", "hold"])
def test_tokens_are_those_of_the_loop_that_is_not_timed(
    base: MaskGIT, conditions: MakeConditions, acceleration: Acceleration, clock: Watch
) -> None:
    expected = generate(base, conditions(3), Decoding(5), acceleration).tokens
    assert torch.equal(run(base, conditions(3), acceleration, clock)[1], expected)
    assert torch.equal(generate(base, conditions(3), Decoding(5), acceleration).tokens, expected)


def laps_of(seconds: dict[str, float]) -> Laps:
    laps = Laps(CPU)
    laps.seconds, laps.calls["base"] = seconds, 4
    return laps


def test_parts_are_medians_and_shares_are_taken_within_their_round() -> None:
    rounds = [laps_of({"rest": 0.1 * k, "head": 0.3 * k, "base": 1.6 * k}) for k in (1.0, 50.0, 2.0)]
    parts = parts_of(rounds)
    assert [part.name for part in parts] == ["base", "head", "rest"]
    assert [part.calls for part in parts] == [4, 0, 0]
    assert [part.ms for part in parts] == pytest.approx([3200, 600, 200])
    assert [part.share for part in parts] == pytest.approx([0.8, 0.15, 0.05])


def test_summary_gives_shares_and_the_cost_of_a_step() -> None:
    parts = [
        Part("base", 4, 80.0, 0.8),
        Part("hold", 8, 8.0, 0.08),
        Part("head", 12, 10.0, 0.1),
        Part("rest", 0, 2, 0.02),
    ]
    said = summary(parts)
    assert "base 80.0%" in said
    assert "12.00%" in said
    assert "hold takes 5.0% of a base pass" in said
