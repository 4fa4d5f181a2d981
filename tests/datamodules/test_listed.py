from __future__ import annotations

from typing import Any

import pytest
import torch

from datamodules.conditions import ClassLabels
from datamodules.listed import Listed


def test_prompts_come_in_turn_and_seeds_count_up_across_batches() -> None:
    batches = list(Listed(["a bag", "a coat"], num_images=5, batch_size=2, seed=7).loader())
    assert [prompt for batch in batches for prompt in batch.prompts] == ["a bag", "a coat", "a bag", "a coat", "a bag"]
    assert torch.cat([batch.seeds for batch in batches]).tolist() == [7, 8, 9, 10, 11]
    assert torch.cat([batch.ids for batch in batches]).tolist() == [0, 1, 2, 3, 4]


def test_another_run_seed_draws_other_images() -> None:
    (batch,) = Listed(["a", "b"], seed=7).loader(99)
    assert batch.seeds.tolist() == [99, 100]


def test_labels_come_in_turn_one_image_each_unless_told_otherwise() -> None:
    (batch,) = Listed(labels=[7, 0]).loader()
    assert batch.labels.tolist() == [7, 0]
    assert batch.prompts == ()


def test_identity_is_that_of_what_is_listed() -> None:
    listed = [Listed(["a", "b"]), Listed(["a", "c"]), Listed(labels=[0, 1]), Listed(labels=[0, 2])]
    assert len({str(one.identity()) for one in listed}) == 4
    assert Listed(labels=[0, 2]).identity() == listed[-1].identity()
    assert ClassLabels(10).identity() != Listed(labels=list(range(10))).identity()  # whose seeds are hashed


def test_seeds_fill_64_bits() -> None:
    (batch,) = Listed(labels=[0], seed=2**63 - 1).loader()
    assert batch.seeds.tolist() == [2**63 - 1]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({}, "neither"),
        ({"prompts": ["a"], "labels": [1]}, "both"),
        ({"prompts": ["a", " "]}, "prompt 2"),
        ({"labels": [1], "seed": 2**63}, str(2**63)),
        ({"labels": [1], "seed": -(2**63) - 1}, "64 bits"),
        ({"labels": [1], "seed": 2**63 - 1, "num_images": 2}, "64 bits"),
        ({"labels": [1], "num_images": 0}, "num_images"),
    ],
)
def test_bad_request_is_refused(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named.replace("*", r"\*")):
        Listed(**arguments)
