from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor

from datamodules.conditions import ClassLabels
from lit_shortcut.acceleration.accelerated import Accelerated, Vanilla
from lit_shortcut.acceleration.plans import Even
from lit_shortcut.acceleration.predictors import Hold, Taylor
from lit_shortcut.acceleration.shortcut import Shortcut
from lit_shortcut.bases.toy import ToyBase
from lit_shortcut.contracts import Conditions
from lit_shortcut.evaluation import Results, Row, images_of, require_feasible, row_facts, take_values
from lit_shortcut.networks.shortcut import ShortcutNet
from lit_shortcut.sampling import Decoding, generate
from tests.metrics.asked import asked

FACTS = {"base": "0123", "decoding": {"guidance": 2.8}, "row": {"budget": 2}, "num_images": 10}
DECODING = Decoding(num_steps=6)


def shortcut(seed: int, **arguments: Any) -> Shortcut:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Shortcut(ShortcutNet(width=16, num_heads=2), **arguments)


# ---- rows


@pytest.mark.parametrize(
    ("row", "name"),
    [
        (Row(8), "vanilla_n8"),
        (Row(8, Vanilla()), "vanilla_n8"),
        (Row(8, Accelerated(Even(3), Hold())), "hold_n8_b3"),
        (Row(16, Accelerated(Even(4), Taylor(2))), "taylor2_n16_b4"),
        (Row(6, Accelerated(Even(6), shortcut(0))), "shortcut_n6_b6"),
        (Row(16, order="halton"), "vanilla_n16_halton"),
        (Row(8, Accelerated(Even(3), Hold()), "halton_rolled"), "hold_n8_b3_halton_rolled"),
    ],
)
def test_name_tells_method_steps_and_budget(row: Row, name: str) -> None:
    assert row.name == name


def test_budget_of_vanilla_is_all_its_steps() -> None:
    assert Row(8).facts() == {"method": "vanilla", "num_steps": 8, "budget": 8}


def test_shortcuts_of_one_name_differ_in_their_facts_when_their_weights_do() -> None:
    one, same, other = (Row(6, Accelerated(Even(2), shortcut(seed))) for seed in (0, 0, 1))
    assert one.name == other.name
    assert one.facts() == same.facts() != other.facts()


def test_budget_above_the_steps_is_refused() -> None:
    with pytest.raises(ValueError, match=r"budget must lie in 1\.\.6.*got 7"):
        Row(6, Accelerated(Even(7), Hold())).facts()


@pytest.mark.parametrize(
    "change",
    [
        {"base": ToyBase(seed=1)},
        {"decoding": Decoding(num_steps=6, guidance=1.0)},
        {"decoding": Decoding(num_steps=6, confidence_noise=1.0)},
        {"row": Row(5)},
        {"row": Row(6, order="halton")},
        {"decoding": Decoding(num_steps=6, order="halton")},
        {"num_images": 11},
    ],
    ids=["base", "guidance", "noise", "row", "row's order", "order", "images"],
)
def test_facts_hold_all_that_values_depend_on(change: dict[str, Any]) -> None:
    same: dict[str, Any] = {"base": ToyBase(), "decoding": DECODING, "row": Row(6), "num_images": 10}
    assert row_facts(**same) == row_facts(**same)
    assert row_facts(**(same | change)) != row_facts(**same)


def test_default_steps_of_the_decoding_do_not_matter_to_a_row_with_its_own() -> None:
    assert row_facts(ToyBase(), Decoding(num_steps=6), Row(4), 10) == row_facts(ToyBase(), Decoding(9), Row(4), 10)


def test_row_with_an_order_is_drawn_in_it() -> None:
    base = ToyBase()
    (conditions,) = ClassLabels(3, batch_size=3).loader()
    own = images_of(base, conditions, DECODING, Row(4, order="halton"))
    assert torch.equal(own, images_of(base, conditions, Decoding(6, order="halton"), Row(4)))
    assert not torch.equal(own, images_of(base, conditions, DECODING, Row(4)))


def test_images_are_those_of_the_decoded_tokens() -> None:
    base, row = ToyBase(), Row(4, Accelerated(Even(2), Hold()))
    (conditions,) = ClassLabels(3, batch_size=3).loader()
    tokens = generate(base, conditions, Decoding(num_steps=4), row.method)
    assert torch.equal(images_of(base, conditions, DECODING, row), base.decode(tokens))


def test_metrics_start_anew_once_their_values_are_taken() -> None:
    class Count:
        def __init__(self) -> None:
            self.seen = 0

        def update(self, images: Tensor, conditions: Conditions) -> None:
            self.seen += len(images)

        def compute(self) -> Tensor:
            return torch.tensor(self.seen)

        def reset(self) -> None:
            self.seen = 0

        def to(self, device: torch.device) -> None: ...

    metric = Count()
    metric.update(torch.zeros(3), asked(torch.zeros(3)))
    assert take_values({"count": metric}) == {"count": 3.0}
    assert take_values({"count": metric}) == {"count": 0.0}


# ---- feasibility


def test_what_can_be_run_passes() -> None:
    base = ToyBase()
    rows = [
        Row(8),
        Row(6, Accelerated(Even(6), Hold())),
        Row(6, Accelerated(Even(1), shortcut(0, base_fingerprint=base.fingerprint))),
    ]
    require_feasible(base, DECODING, rows, ClassLabels(12, batch_size=5))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (Row(17), r"num_steps must lie in 1\.\.16"),
        (Row(16), "schedule 'arccos' cannot spend 16 tokens in 16 steps"),
        (Row(0), r"num_steps must lie in 1\.\.16"),
        (Row(6, Accelerated(Even(0), Hold())), r"budget must lie in 1\.\.6.*got 0"),
        (Row(6, Accelerated(Even(7), Hold())), r"budget must lie in 1\.\.6.*got 7"),
        (Row(6, Accelerated(Even(2), shortcut(0, base_fingerprint="other"))), "base other"),
    ],
)
def test_row_that_cannot_be_run_is_refused(row: Row, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        require_feasible(ToyBase(), DECODING, [Row(6), row], ClassLabels(2))


def test_class_that_only_a_late_batch_asks_for_is_refused() -> None:
    with pytest.raises(ValueError, match=r"class labels must lie in 0\.\.9; got \[10\]"):
        require_feasible(ToyBase(), DECODING, [], ClassLabels(11, batch_size=5, num_classes=11))


# ---- results


def test_finished_row_is_found_under_equal_facts_alone(tmp_path: Path) -> None:
    results, row = Results(tmp_path), Row(6)
    assert results.find(row, 0, FACTS) is None
    results.add(row, 0, FACTS, {"fid": 1.5})
    assert Results(tmp_path).find(row, 0, FACTS) == {"fid": 1.5}
    assert results.find(row, 1, FACTS) is None
    assert results.find(Row(7), 0, FACTS) is None
    for name in FACTS:
        assert results.find(row, 0, FACTS | {name: "another"}) is None


def test_row_measured_anew_replaces_the_old_one(tmp_path: Path) -> None:
    results, row = Results(tmp_path), Row(6)
    results.add(row, 0, FACTS, {"fid": 1.5})
    results.add(row, 0, FACTS | {"num_images": 20}, {"fid": 1.2})
    assert results.find(row, 0, FACTS) is None
    assert results.find(row, 0, FACTS | {"num_images": 20}) == {"fid": 1.2}
    assert [path.name for path in (tmp_path / "rows").iterdir()] == ["vanilla_n6_seed0.json"]


@pytest.mark.parametrize("content", [b"", b'{"facts": {', b"\xff\xfe\x00"], ids=["empty", "cut short", "no text"])
def test_damaged_result_is_named(tmp_path: Path, content: bytes) -> None:
    results, row = Results(tmp_path), Row(6)
    results.add(row, 0, FACTS, {})
    path = tmp_path / "rows" / "vanilla_n6_seed0.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"vanilla_n6_seed0\.json: not a result file .*delete it"):
        results.find(row, 0, FACTS)


def test_latency_is_returned_as_it_was_stored(tmp_path: Path) -> None:
    results = Results(tmp_path)
    assert results.latency() is None
    results.set_latency(FACTS, {"vanilla_n6": {"median_ms": 2.0}})
    assert results.latency() == {"facts": FACTS, "measured": {"vanilla_n6": {"median_ms": 2.0}}}


def test_strip_of_images_keeps_their_pixels_side_by_side(tmp_path: Path) -> None:
    images = torch.randint(256, (3, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    results = Results(tmp_path)
    results.add_images(Row(6), images)
    strip = torchvision.io.read_image(str(results.images_path(Row(6))))
    assert strip.shape == (3, 10, 28)
    for k in range(3):
        assert torch.equal(strip[:, 1:9, 1 + 9 * k : 9 + 9 * k], images[k])
    assert bool((strip[:, 0] == 255).all())
