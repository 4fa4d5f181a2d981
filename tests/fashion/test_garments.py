from __future__ import annotations

import random

import pytest
import torch

from lit_shortcut.fashion.garments import (
    NOUNS,
    WORDS,
    Description,
    bounds,
    caption,
    follows,
    measure,
    read_prompt,
    true_attributes,
)


def image(*rows: list[int]) -> torch.Tensor:
    return torch.tensor([[list(rows)]], dtype=torch.uint8)


def test_measures_have_their_meaning() -> None:
    drawn = image([0, 0, 0, 0], [0, 255, 51, 0], [0, 51, 51, 0])
    values = {name: float(value) for name, value in measure(drawn).items()}
    assert values["brightness"] == pytest.approx((255 + 3 * 51) / 4 / 255)
    assert values["texture"] == pytest.approx((204 + 204 + 0 + 0) / 4 / 255)  # four neighbouring pairs
    assert (values["width"], values["height"]) == (2, 2)


def test_faint_pixels_are_background() -> None:
    values = measure(image([24, 24, 200, 24]))
    assert (float(values["width"]), float(values["brightness"])) == (1, pytest.approx(200 / 255))


def test_an_empty_image_measures_zero() -> None:
    assert {name: float(value) for name, value in measure(torch.zeros(1, 1, 5, 5, dtype=torch.uint8)).items()} == {
        "brightness": 0,
        "texture": 0,
        "width": 0,
        "height": 0,
    }


def test_images_in_colour_measure_as_their_mean() -> None:
    grey = torch.randint(256, (3, 1, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for name, value in measure(grey.expand(-1, 3, -1, -1)).items():
        torch.testing.assert_close(value, measure(grey)[name])


@pytest.mark.parametrize("label", range(10))
def test_caption_says_nothing_but_the_truth(label: int) -> None:
    rng = random.Random(label)
    for _ in range(200):
        true = {name: rng.randrange(2) for name in bounds(label)}
        said = read_prompt(caption(label, true, rng))
        assert said.label == label
        assert said.attributes.items() <= true.items()


def test_every_word_is_used_and_understood() -> None:
    rng = random.Random(0)
    sentences = [caption(label, dict.fromkeys(bounds(label), k % 2), rng) for label in range(10) for k in range(400)]
    text = " ".join(sentences)
    for name in (noun for names in NOUNS for noun in names):
        assert f"{name}" in text
    for little, much in WORDS.values():
        for word in (*little, *much):
            assert word in text
    assert "an ankle" in text
    assert "a ankle" not in text


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("A DARK T-Shirt", Description(0, {"brightness": 0})),
        ("a shirt", Description(6, {})),
        ("two horses", Description(None, {})),
        ("ankle boot, high and shiny", Description(9, {"height": 1})),
        ("a coat for my handbag", Description(8, {})),  # the last one named
    ],
)
def test_prompt_is_read_by_its_words(prompt: str, expected: Description) -> None:
    assert read_prompt(prompt) == expected


@pytest.mark.parametrize("label", range(10))
def test_what_is_true_of_an_image_it_follows(label: int) -> None:
    for quantity in (0.0, 1.0):  # less than any bound, more than any
        values = dict.fromkeys(bounds(label), quantity * 100)
        true = true_attributes(values, label)
        assert true == dict.fromkeys(bounds(label), int(quantity))
        assert all(follows(values, label, true))
        assert not any(follows(values, label, {name: 1 - sign for name, sign in true.items()}))


def test_attributes_between_the_bounds_are_not_said() -> None:
    values = {name: sum(both) / 2 for name, both in bounds(3).items()}
    assert true_attributes(values, 3) == {}


def test_attributes_that_are_not_said_of_a_class_are_left_out() -> None:
    assert follows({"height": 5.0, "width": 5.0, "brightness": 0.0, "texture": 0.0}, 0, {"height": 1}) == []
