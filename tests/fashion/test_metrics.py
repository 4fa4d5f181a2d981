from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lit_shortcut.contracts import Conditions
from lit_shortcut.fashion.metrics import AttributeAgreement, PromptClassAgreement


def conditions(*prompts: str) -> Conditions:
    ids = torch.arange(len(prompts))
    return Conditions(ids, ids, ids, prompts)


class Told(nn.Module):
    """Takes an image for the class that its first pixel tells."""

    def forward(self, images: Tensor) -> Tensor:
        return torch.eye(10)[images[:, 0, 0, 0].long()]


def of_classes(*classes: int) -> Tensor:
    return torch.tensor(classes, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4)


def test_share_of_images_of_the_class_that_prompts_name() -> None:
    agreement = PromptClassAgreement(Told())
    agreement.update(of_classes(0, 9), conditions("a dark t-shirt", "a bag"))
    agreement.update(of_classes(4, 4), conditions("a coat", "something else"))  # the second names no class
    assert float(agreement.compute()) == pytest.approx(2 / 3)
    agreement.reset()
    agreement.update(of_classes(8), conditions("a handbag"))
    assert float(agreement.compute()) == 1


def test_share_of_attributes_that_images_have() -> None:
    white = torch.full((1, 3, 28, 28), 255, dtype=torch.uint8)
    agreement = AttributeAgreement()
    agreement.update(white, conditions("a bright, wide coat"))  # both hold
    agreement.update(white, conditions("a dark plain bag"))  # the first does not
    agreement.update(white, conditions("a picture of a dress"))  # asks for none
    assert float(agreement.compute()) == pytest.approx(3 / 4)
    agreement.reset()
    agreement.update(white, conditions("a dark coat"))
    assert float(agreement.compute()) == 0


@pytest.mark.parametrize("metric", [PromptClassAgreement(Told()), AttributeAgreement()])
def test_conditions_without_prompts_are_refused(metric: PromptClassAgreement | AttributeAgreement) -> None:
    bare = Conditions(torch.arange(2), torch.arange(2), torch.arange(2))
    with pytest.raises(ValueError, match=r"expected a prompt for each of 2 .* got 0"):
        metric.update(of_classes(1, 2), bare)
