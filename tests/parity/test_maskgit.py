"""Golden tensors of the reference implementation; README.md beside this file says how they were made."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lit_shortcut.acceleration.accelerated import Accelerated, Vanilla
from lit_shortcut.acceleration.plans import Even
from lit_shortcut.acceleration.shortcut import Shortcut
from lit_shortcut.bases.maskgit.adapter import MaskGIT
from lit_shortcut.bases.maskgit.transformer import NAMES as MASKGIT
from lit_shortcut.bases.maskgit.transformer import MaskGITTransformer
from lit_shortcut.contracts import Acceleration, Conditions
from lit_shortcut.networks.shortcut import NAMES as SHORTCUT
from lit_shortcut.networks.shortcut import ShortcutNet
from lit_shortcut.published import fill
from lit_shortcut.sampling import Decoding, sample
from lit_shortcut.weights import load_tensors
from tests.parity.greedy import require_same_run

FILE = Path(__file__).with_name("maskgit_tiny.safetensors")
GOLDEN, META = load_tensors(FILE)


def part(prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in GOLDEN.items() if k.startswith(prefix)}


class NoTokenizer:
    codebook_size = META["codebook_size"]

    def encode(self, images: Tensor) -> Tensor:
        raise AssertionError("not used here")

    decode = encode


@pytest.fixture(scope="module")
def base() -> MaskGIT:
    transformer = MaskGITTransformer(
        codebook_size=META["codebook_size"],
        num_classes=META["nclass"],
        grid=META["grid"],
        width=META["hidden_dim"],
        depth=META["depth"],
        num_heads=META["heads"],
        mlp_width=META["mlp_dim"],
    )
    fill(transformer, part("base."), MASKGIT, FILE)
    return MaskGIT(transformer, NoTokenizer())


@pytest.fixture(scope="module")
def network() -> ShortcutNet:
    network = ShortcutNet(META["hidden_dim"], META["heads"], META["bottleneck_ratio"], META["n_block"])
    fill(network, part("shortcut."), SHORTCUT, FILE)
    return network


def test_features_and_logits_equal_the_reference(base: MaskGIT) -> None:
    classes = base.transformer.class_ids(GOLDEN["in.label"])
    classes = classes.masked_fill(GOLDEN["in.drop_label"].bool(), base.transformer.dropped_class_id)
    features = base.transformer(GOLDEN["in.tokens"].flatten(1), classes)
    torch.testing.assert_close(features, GOLDEN["out.feature"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(base.interface.logits(features), GOLDEN["out.logits"], rtol=1e-5, atol=1e-5)


def test_next_features_equal_the_reference(base: MaskGIT, network: ShortcutNet) -> None:
    positions = torch.stack([row.nonzero().flatten() for row in GOLDEN["in.new_token_map"].bool()])
    control = base.interface.embed(GOLDEN["in.new_token_ids"], positions)
    following = network(GOLDEN["out.feature"], control, GOLDEN["in.mask_ratio"])
    torch.testing.assert_close(following, GOLDEN["out.next_feature"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("run", "num_steps", "budget"),
    [("vanilla_n8", 8, None), ("vanilla_n15", 15, None), ("shortcut_n15_b7", 15, 7), ("shortcut_n32_b9", 32, 9)],
)
def test_greedy_runs_equal_the_reference_token_for_token(
    base: MaskGIT, network: ShortcutNet, run: str, num_steps: int, budget: int | None
) -> None:
    labels = GOLDEN["in.greedy_label"]
    decoding = Decoding(num_steps=num_steps, guidance=META["cfg_w"], temperature=0, confidence_noise=0)
    acceleration: Acceleration = Vanilla() if budget is None else Accelerated(Even(budget), Shortcut(network))
    steps = list(sample(base, Conditions(labels, labels, labels), decoding, acceleration))
    require_same_run(base, steps, GOLDEN, run, lambda step: decoding.guidance * decoding.progress(step))
    assert sum(step.is_full for step in steps) == (budget or num_steps)
