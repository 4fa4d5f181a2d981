"""Shortcuts of guided features: one pass of the network for both guidance branches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lit_shortcut.acceleration.accelerated import Accelerated
from lit_shortcut.acceleration.plans import Even
from lit_shortcut.acceleration.predictors import Hold
from lit_shortcut.acceleration.shortcut import Shortcut
from lit_shortcut.guidance import guide
from lit_shortcut.networks.shortcut import ShortcutNet
from lit_shortcut.sampling import Course, Decoding, generate, sample
from lit_shortcut.weights import WeightsError
from tests.gpu.cases import CASES

DECODING = Decoding(num_steps=6, guidance=2.0)  # of MaskGIT, so that its scale rises
of_both_kinds = pytest.mark.parametrize("name", ["guided", "dimoo, guided"])


@pytest.mark.parametrize(("name", "course"), [("guided", "linear"), ("dimoo, guided", "constant")])
def test_untrained_network_holds_the_features_of_both_branches(name: str, course: Course) -> None:
    """An anchored one whatever the course of the scale: features are guided by that of the step that is predicted."""
    case, decoding = CASES[name], replace(DECODING, guidance_course=course)
    base, network = case.make_base(), case.network().eval()
    ours, theirs = (
        list(sample(base, case.conditions(), decoding, Accelerated(Even(2), predictor)))
        for predictor in (Shortcut(network), Hold())
    )
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.tokens, other.tokens)
        logits, expected = (guide(base.interface.logits(step.features), step.state.guidance) for step in (one, other))
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@of_both_kinds
def test_network_runs_once_for_both_branches(name: str) -> None:
    case = CASES[name]
    network, batches = case.make_network(), list[int]()
    network.register_forward_pre_hook(lambda module, inputs: batches.append(len(inputs[0])))
    steps = list(sample(case.make_base(), case.conditions(), DECODING, Accelerated(Even(2), Shortcut(network))))
    assert batches == [2] * 4
    for step in steps:
        conditional, unconditional = step.features
        assert torch.equal(conditional, unconditional) == (not step.is_full)


def test_without_guidance_it_predicts_the_only_branch() -> None:
    decoding = Decoding(num_steps=6, guidance=0.0)
    case = CASES["guided"]
    network = case.make_network()
    plain = ShortcutNet(**network.hparams | {"guided": False}).eval()
    plain.load_state_dict(network.state_dict())
    ours, theirs = (
        generate(case.make_base(), case.conditions(), decoding, Accelerated(Even(2), Shortcut(made))).tokens
        for made in (network, plain)
    )
    assert torch.equal(ours, theirs)


def test_head_that_is_not_linear_is_refused() -> None:
    case = CASES["meissonic"]
    shortcut = Shortcut(ShortcutNet(24, num_heads=2, guided=True))
    with pytest.raises(WeightsError, match="its head is not linear"):
        generate(case.make_base(), case.conditions(), DECODING, Accelerated(Even(2), shortcut))
