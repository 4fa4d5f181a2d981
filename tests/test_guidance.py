from __future__ import annotations

import pytest
import torch

from lit_shortcut.guidance import guide, guide_rows
from tests.tiny_trajectories import interface


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("scale", [0.0, 0.4, 2.8, -0.5])
def test_guidance_moves_away_from_the_unconditional_branch(logits: torch.Tensor, scale: float) -> None:
    conditional, unconditional = logits
    expected = (1 + scale) * conditional.double() - scale * unconditional.double()
    torch.testing.assert_close(guide(logits, scale).double(), expected, rtol=1e-5, atol=1e-5)


def test_guidance_of_zero_is_the_conditional_branch(logits: torch.Tensor) -> None:
    assert torch.equal(guide(logits, 0.0), logits[0])
    assert torch.equal(guide(logits[:1], 0.0), logits[0])


def test_guidance_without_the_unconditional_branch_is_refused(logits: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"scale 2\.8 needs the unconditional branch"):
        guide(logits[:1], 2.8)


def test_linear_head_maps_guided_features_to_guided_logits() -> None:
    features = torch.randn(2, 3, 10, 6, generator=torch.Generator().manual_seed(0))
    guided, head = guide_rows(features, 1.7, 9), interface()
    torch.testing.assert_close(head.logits(guided), guide(head.logits(features), 1.7), rtol=1e-4, atol=1e-4)
    assert torch.equal(guided[:, 9], features[0, :, 9])  # no image row


@pytest.mark.parametrize("scale", [-0.5, 0.3, 2.8])
def test_features_that_are_guided_already_stay_as_they_are(scale: float) -> None:
    features = torch.randn(2, 3, 10, 6, generator=torch.Generator().manual_seed(0))
    guided = guide_rows(features, 1.7, 9)
    assert torch.equal(guide_rows(guided.expand(2, -1, -1, -1), scale, 9), guided)


def test_scales_may_differ_between_samples() -> None:
    features = torch.randn(2, 3, 10, 6, generator=torch.Generator().manual_seed(0))
    scales = [0.0, 1.5, 2.8]
    found = guide_rows(features, torch.tensor(scales)[:, None, None], 9)
    for row, scale in enumerate(scales):
        torch.testing.assert_close(found[row], guide_rows(features[:, row, None], scale, 9)[0])
