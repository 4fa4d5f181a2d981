"""What can be said of an image of Fashion-MNIST and measured in its pixels: its class, and three attributes.

Captions of real images are written from these measurements, and generated images are judged by the same ones.
"""

from __future__ import annotations

import random
import re
from typing import NamedTuple

import torch
from torch import Tensor

NOUNS = (
    ("t-shirt", "tee", "t-shirt"),
    ("pair of trousers", "pair of pants", "pair of trousers"),
    ("pullover", "sweater", "jumper"),
    ("dress", "gown", "dress"),
    ("coat", "jacket", "coat"),
    ("sandal", "strappy sandal", "sandal"),
    ("shirt", "button-up shirt", "shirt"),
    ("sneaker", "trainer", "sneaker"),
    ("bag", "handbag", "bag"),
    ("ankle boot", "boot", "ankle boot"),
)
"""Wordings of each class, in the order of Fashion-MNIST's labels; a repeated one is used more often."""

WORDS = {
    "brightness": (("dark", "black"), ("bright", "light")),
    "texture": (("plain", "smooth"), ("patterned", "textured")),
    "width": (("narrow", "slim"), ("wide", "broad")),
    "height": (("low", "flat"), ("high", "tall")),
}
"""Wordings of little and of much of each attribute. Width is said of upright garments, height of the others."""

# 30 % and 70 % quantiles over the 60,000 training images: of all classes, then of each one.
_BRIGHTNESS = (0.54, 0.73)
_TEXTURE = (
    (0.068, 0.094),
    (0.111, 0.129),
    (0.080, 0.097),
    (0.088, 0.118),
    (0.084, 0.105),
    (0.155, 0.190),
    (0.077, 0.103),
    (0.122, 0.148),
    (0.081, 0.106),
    (0.100, 0.119),
)
_EXTENT = ((21, 23), (11, 12), (20, 22), (13, 16), (19, 21), (12, 20), (20, 22), (12, 14), (20, 27), (19, 23))
_UPRIGHT = (True, True, True, True, True, False, True, False, False, False)
_INK = 24  # grey values above are garment, not background

_TEMPLATES = ("a {0}", "a photo of a {0}", "a picture of a {0}", "{0}", "one {0}", "a grey picture of one {0}")
_LABELS = {name.split()[-1]: label for label, names in enumerate(NOUNS) for name in names}
_SIGNS = {word: (name, sign) for name, both in WORDS.items() for sign, words in enumerate(both) for word in words}


class Description(NamedTuple):
    """What a prompt asks for: class ``label``, None where it names none, and attributes with 0 (little) or 1 (much)."""

    label: int | None
    attributes: dict[str, int]


def measure(images: Tensor) -> dict[str, Tensor]:
    """Attributes (B,) of uint8 ``images`` (B, 1 or 3, H, W).

    ``brightness``: mean grey value of the garment, 0 to 1. ``texture``: mean difference of its neighbouring pixels, in
    the same units. ``width`` and ``height``: of the box around it, in pixels.
    """
    grey = images.float().mean(1)
    ink = grey > _INK
    area = ink.sum((1, 2)).clamp(min=1)
    steps, pairs = torch.zeros(len(grey), device=grey.device), torch.zeros(len(grey), device=grey.device)
    for axis in (1, 2):
        both = ink.narrow(axis, 1, ink.shape[axis] - 1) & ink.narrow(axis, 0, ink.shape[axis] - 1)
        steps = steps + (grey.diff(dim=axis).abs() * both).sum((1, 2))
        pairs = pairs + both.sum((1, 2))
    return {
        "brightness": (grey * ink).sum((1, 2)) / area / 255,
        "texture": steps / pairs.clamp(min=1) / 255,
        "width": _extent(ink.any(1)),
        "height": _extent(ink.any(2)),
    }


def bounds(label: int) -> dict[str, tuple[float, float]]:
    """Attributes that are said of class ``label``: below the first value it has little of one, above the second much.

    >>> sorted(bounds(0)), sorted(bounds(9))
    (['brightness', 'texture', 'width'], ['brightness', 'height', 'texture'])
    """
    extent = "width" if _UPRIGHT[label] else "height"
    return {"brightness": _BRIGHTNESS, "texture": _TEXTURE[label], extent: _EXTENT[label]}


def true_attributes(values: dict[str, float], label: int) -> dict[str, int]:
    """Attributes of an image of class ``label`` with the measured ``values`` that are clear enough to be said.

    >>> true_attributes({"brightness": 0.9, "texture": 0.09, "width": 12.0, "height": 28.0}, label=0)
    {'brightness': 1, 'width': 0}
    """
    said = {}
    for name, (low, high) in bounds(label).items():
        if values[name] < low or values[name] > high:
            said[name] = int(values[name] > high)
    return said


def caption(label: int, attributes: dict[str, int], rng: random.Random) -> str:
    """A sentence about an image of class ``label`` that tells some of its ``attributes``, in words drawn by ``rng``."""
    told = rng.sample(sorted(attributes), rng.randint(0, len(attributes)))
    adjectives = [rng.choice(WORDS[name][attributes[name]]) for name in told]
    noun = rng.choice(NOUNS[label])
    template = rng.choice(_TEMPLATES)
    if adjectives and rng.random() < 0.25:  # behind the noun: "a coat, dark and wide"
        sentence = f"{template.format(noun)}, {' and '.join(adjectives)}"
    else:
        sentence = template.format(" ".join([*adjectives, noun]))
    return re.sub(r"\ba (?=[aeiou])", "an ", sentence)


def read_prompt(prompt: str) -> Description:
    """What ``prompt`` asks for, by the words of :data:`NOUNS` and :data:`WORDS`; others say nothing.

    >>> read_prompt("a photo of a dark, wide t-shirt")
    Description(label=0, attributes={'brightness': 0, 'width': 1})
    """
    words = re.findall(r"[a-z-]+", prompt.lower())
    labels = [_LABELS[word] for word in words if word in _LABELS]
    return Description(labels[-1] if labels else None, dict(_SIGNS[word] for word in words if word in _SIGNS))


def follows(values: dict[str, float], label: int, attributes: dict[str, int]) -> list[bool]:
    """Whether an image of class ``label`` with measured ``values`` lies on the side asked for, for each attribute.

    The border is the middle between little and much; an attribute that is not said of the class is left out.
    """
    known = bounds(label)
    return [(values[name] > sum(known[name]) / 2) == bool(sign) for name, sign in attributes.items() if name in known]


def _extent(occupied: Tensor) -> Tensor:
    """First to last place (B,) that is true in ``occupied`` (B, L); 0 where none is."""
    places = torch.arange(1, occupied.shape[1] + 1, device=occupied.device)
    last = (occupied * places).amax(1)
    first = (occupied * places.flip(0)).amax(1)
    return (last + first - occupied.shape[1]).clamp(min=0).float()
