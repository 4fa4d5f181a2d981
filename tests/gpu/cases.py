"""Bases of every kind with the shortcut that fits each, small and random, for tests of where and how they run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from lit_shortcut.acceleration.accelerated import Accelerated, Predictor, Vanilla
from lit_shortcut.acceleration.plans import Even
from lit_shortcut.acceleration.predictors import Hold, Taylor
from lit_shortcut.acceleration.shortcut import Shortcut
from lit_shortcut.bases.dimoo.toy import toy_dimoo
from lit_shortcut.bases.maskgit.adapter import MaskGIT
from lit_shortcut.bases.maskgit.transformer import MaskGITTransformer
from lit_shortcut.bases.toy import ToyBase
from lit_shortcut.bases.toy_cross import CrossToyBase
from lit_shortcut.contracts import Acceleration, Conditions, MaskedImageModel
from lit_shortcut.fashion.tokenizer import FSQTokenizer
from lit_shortcut.networks.llada_shortcut import LLaDAShortcutNet
from lit_shortcut.networks.shortcut import ShortcutNet, ShortcutNetwork
from tests.published_amused import tiny_amused
from tests.published_meissonic import tiny_meissonic
from tests.tiny_bases import tiny_halton, tiny_mmada

EQUAL_PROMPTS, UNEQUAL_PROMPTS = ("a cat", "a dog"), ("a cat", "three grey cats")


class Case(NamedTuple):
    """How to make a base and the shortcut network for it, and the prompts it is asked for."""

    make_base: Callable[[], MaskedImageModel]
    network: Callable[[], ShortcutNetwork]
    prompts: tuple[str, ...] = ()

    def make_network(self) -> ShortcutNetwork:
        """One that predicts something else than its input, ready to run; the same at every call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            network = self.network()
            assert isinstance(network.widen, nn.Linear)
            nn.init.normal_(network.widen.weight, std=0.1)
        return network.eval().requires_grad_(False)

    def conditions(self, count: int = 2) -> Conditions:
        ids = torch.arange(count)
        return Conditions(ids, ids + 5, ids, self.prompts)


def maskgit(depth: int = 2) -> MaskGIT:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = MaskGITTransformer(
            codebook_size=8, num_classes=5, grid=4, width=32, depth=depth, num_heads=2, mlp_width=64
        )
        nn.init.normal_(transformer.token_embedding.weight, std=1.0)
        return MaskGIT(transformer, FSQTokenizer(levels=[8], width=8, image_size=8))


CASES = {
    "toy": Case(ToyBase, partial(ShortcutNet, 16, num_heads=2)),
    "cross toy": Case(CrossToyBase, partial(ShortcutNet, 16, num_heads=2), UNEQUAL_PROMPTS),
    "maskgit": Case(maskgit, partial(ShortcutNet, 32, num_heads=2)),
    "neighbourhood": Case(maskgit, partial(ShortcutNet, 32, num_heads=2, grid=4, reach=1)),
    "masked rows": Case(maskgit, partial(ShortcutNet, 32, num_heads=2, rows="masked", anchored=True)),
    "guided": Case(maskgit, partial(ShortcutNet, 32, num_heads=2, rows="masked", anchored=True, guided=True)),
    "halton": Case(tiny_halton, partial(ShortcutNet, 32, num_heads=2)),
    "amused": Case(lambda: tiny_amused(0, num_hidden_layers=1), partial(ShortcutNet, 32, num_heads=2), UNEQUAL_PROMPTS),
    "meissonic": Case(
        lambda: tiny_meissonic(0, 64, downsample=True, upsample=True, num_single_layers=1),
        partial(ShortcutNet, 24, num_heads=2),
        UNEQUAL_PROMPTS,
    ),
    "mmada": Case(tiny_mmada, partial(LLaDAShortcutNet, 16, num_heads=2, mlp_width=32), UNEQUAL_PROMPTS),
    "dimoo": Case(toy_dimoo, partial(LLaDAShortcutNet, 16, num_heads=2, mlp_width=32), EQUAL_PROMPTS),
    "dimoo, padded": Case(toy_dimoo, partial(LLaDAShortcutNet, 16, num_heads=2, mlp_width=32), UNEQUAL_PROMPTS),
    "dimoo, guided": Case(
        toy_dimoo, partial(LLaDAShortcutNet, 16, num_heads=2, mlp_width=32, guided=True), UNEQUAL_PROMPTS
    ),
}


def accelerations(network: ShortcutNetwork, budget: int = 2) -> dict[str, Acceleration]:
    predictors: dict[str, Predictor] = {"hold": Hold(), "taylor": Taylor(1), "shortcut": Shortcut(network)}
    return {"vanilla": Vanilla()} | {
        name: Accelerated(Even(budget), predictor) for name, predictor in predictors.items()
    }
