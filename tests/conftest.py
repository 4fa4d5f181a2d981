from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from selenium.webdriver import Chrome

from lit_shortcut.bases.dimoo.adapter import DiMOO
from lit_shortcut.bases.dimoo.toy import toy_dimoo
from lit_shortcut.bases.maskgit.adapter import MaskGIT
from lit_shortcut.bases.maskgit.transformer import MaskGITTransformer
from lit_shortcut.bases.toy_cross import CrossToyBase
from lit_shortcut.contracts import Conditions
from lit_shortcut.fashion.tokenizer import FSQTokenizer
from tests.browser import chromium

NUM_CLASSES = 5
PROMPTS = ("a red cat", "two", "three grey cats", "a cat", "größer")  # of 9, 3, 15, 5 and 8 bytes


def _make_base(seed: int = 0) -> MaskGIT:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = MaskGITTransformer(
            codebook_size=8, num_classes=NUM_CLASSES, grid=4, width=32, depth=2, num_heads=2, mlp_width=64
        )
        # far enough from the initial values that classes, places and neighbours change the features visibly
        torch.nn.init.normal_(transformer.token_embedding.weight, std=1.0)
        torch.nn.init.normal_(transformer.position_embedding, std=0.5)
        torch.nn.init.normal_(transformer.head_bias, std=0.5)
        return MaskGIT(transformer, FSQTokenizer(levels=[8], width=8, image_size=8))


def _conditions(count: int, first_seed: int = 100) -> Conditions:
    ids = torch.arange(count)
    return Conditions(ids, ids + first_seed, ids % NUM_CLASSES)


def _prompted(count: int, first_seed: int = 100) -> Conditions:
    return _conditions(count, first_seed)._replace(prompts=tuple(PROMPTS[i % len(PROMPTS)] for i in range(count)))


@pytest.fixture(scope="session")
def make_base() -> Callable[[int], MaskGIT]:
    """A tiny random MaskGIT for each seed: 4×4 tokens of 8 codes, width 32, 5 classes, 8×8 images."""
    return _make_base


@pytest.fixture(scope="session")
def base() -> MaskGIT:
    """The tiny MaskGIT of seed 0; tests share it, so change nothing in it."""
    return _make_base()


@pytest.fixture(scope="session")
def make_dimoo() -> Callable[[int], DiMOO]:
    """A tiny random DiMOO for each seed: 4×4 tokens of 8 codes, width 16, prompts in bytes."""
    return lambda seed: toy_dimoo(seed=seed)


@pytest.fixture(scope="session")
def make_cross() -> Callable[[int], CrossToyBase]:
    """A toy base for each seed that sees prompts by cross-attention: 4×4 tokens of 8 codes, width 16."""
    return lambda seed: CrossToyBase(seed=seed)


@pytest.fixture(scope="session")
def dimoo() -> DiMOO:
    """The tiny DiMOO of seed 0; tests share it, so change nothing in it."""
    return toy_dimoo()


@pytest.fixture(scope="session")
def prompted() -> Callable[..., Conditions]:
    """``prompted(count, first_seed=100)``: as ``conditions``, with prompts of different lengths."""
    return _prompted


@pytest.fixture(scope="session")
def conditions() -> Callable[..., Conditions]:
    """``conditions(count, first_seed=100)``: consecutive ids and seeds, classes in turn."""
    return _conditions


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    """A headless Chromium, shared; tests that need it are skipped where there is none."""
    with chromium(tmp_path_factory.mktemp("chromium")) as opened:
        yield opened
