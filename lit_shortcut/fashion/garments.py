"""Garments of Fashion-MNIST in words and numbers: the class, and three attributes measured in the pixels.

Captions of real images are made from these measurements, and generated images are judged by them.
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
"""Nouns of each class, in the order of Fashion-MNIST's labels; a repeated one is used more often."""

WORDS = {
    "brightness": (("dark", "black"), ("bright", "light")),
    "texture": (("plain", "smooth"), ("patterned", "textured")),
    "width": (("narrow", "slim"), ("wide", "broad")),
    "height": (("low", "flat"), ("high", "tall")),
}
"""Adjectives for low and for high values of each attribute. Width describes upright garments, height the others."""

# 30 % and 70 % quantiles over the 60,000 training images: brightness of all classes, the others of each class.
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
_INK = 24  # grey values above this are garment, not background

_TEMPLATES = ("a {0}", "a photo of a {0}", "a picture of a {0}", "{0}", "one {0}", "a grey picture of one {0}")
_LABELS = {name.split()[-1]: label for label, names in enumerate(NOUNS) for name in names}
_SIGNS = {word: (name, sign) for name, both in WORDS.items() for sign, words in enumerate(both) for word in words}


class Description(NamedTuple):
    """Content of a prompt: class ``label``, None if it names no class, and attributes, each 0 (low) or 1 (high)."""

    label: int | None
    attributes: dict[str, int]


def measure(images: Tensor) -> dict[str, Tensor]:
    """Return the attributes (B,) of uint8 ``images`` (B, 1 or 3, H, W).

    ``brightness``: mean grey value of the garment, 0 to 1. ``texture``: mean difference of its neighbouring pixels, in
    the same units. ``width`` and ``height``: size of the box around it, in pixels.
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
    """Return thresholds of the attributes that describe class ``label``: low below the first, high above the second.

    >>> sorted(bounds(0)), sorted(bounds(9))
    (['brightness', 'texture', 'width'], ['brightness', 'height', 'texture'])
    """
    extent = "width" if _UPRIGHT[label] else "height"
    return {"brightness": _BRIGHTNESS, "texture": _TEXTURE[label], extent: _EXTENT[label]}


def true_attributes(values: dict[str, float], label: int) -> dict[str, int]:
    """Return the attributes that are clearly low or high in an image of class ``label`` with measured ``values``.

    >>> true_attributes({"brightness": 0.9, "texture": 0.09, "width": 12.0, "height": 28.0}, label=0)
    {'brightness': 1, 'width': 0}
    """
    return {
        name: int(values[name] > high)
        for name, (low, high) in bounds(label).items()
        if values[name] < low or values[name] > high
    }


def caption(label: int, attributes: dict[str, int], rng: random.Random) -> str:
    """Return a caption of class ``label`` that names some of its ``attributes``, in words drawn by ``rng``."""
    named = rng.sample(sorted(attributes), rng.randint(0, len(attributes)))
    adjectives = [rng.choice(WORDS[name][attributes[name]]) for name in named]
    noun = rng.choice(NOUNS[label])
    template = rng.choice(_TEMPLATES)
    if adjectives and rng.random() < 0.25:  # after the noun: "a coat, dark and wide"
        sentence = f"{template.format(noun)}, {' and '.join(adjectives)}"
    else:
        sentence = template.format(" ".join([*adjectives, noun]))
    return re.sub(r"\ba (?=[aeiou])", "an ", sentence)


def read_prompt(prompt: str) -> Description:
    """Parse ``prompt`` by the words in :data:`NOUNS` and :data:`WORDS`; others are ignored.

    >>> read_prompt("a photo of a dark, wide t-shirt")
    Description(label=0, attributes={'brightness': 0, 'width': 1})
    """
    words = re.findall(r"[a-z-]+", prompt.lower())
    labels = [_LABELS[word] for word in words if word in _LABELS]
    return Description(labels[-1] if labels else None, dict(_SIGNS[word] for word in words if word in _SIGNS))


def follows(values: dict[str, float], label: int, attributes: dict[str, int]) -> list[bool]:
    """Return, for each of the ``attributes``, whether measured ``values`` lie on the prompt's side of the threshold.

    The threshold is midway between low and high for class ``label``; attributes that don't describe it are skipped.
    """
    known = bounds(label)
    return [(values[name] > sum(known[name]) / 2) == bool(sign) for name, sign in attributes.items() if name in known]


def _extent(occupied: Tensor) -> Tensor:
    """Return the distance (B,) from the first to the last true place in ``occupied`` (B, L), inclusive; 0 if none."""
    places = torch.arange(1, occupied.shape[1] + 1, device=occupied.device)
    last = (occupied * places).amax(1)
    first = (occupied * places.flip(0)).amax(1)
    return (last + first - occupied.shape[1]).clamp(min=0).float()
