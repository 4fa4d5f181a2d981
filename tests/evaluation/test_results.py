from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision

from datamodules.conditions import ClassLabels
from lit_shortcut.acceleration.predictors import Hold
from lit_shortcut.acceleration.shortcut import Shortcut
from lit_shortcut.bases.dimoo.toy import toy_dimoo
from lit_shortcut.bases.toy import ToyBase
from lit_shortcut.evaluation.drawing import draw_row, require_feasible
from lit_shortcut.evaluation.identity import differences, loop_identities, row_identity
from lit_shortcut.evaluation.results import Results
from lit_shortcut.evaluation.rows import Row, build_rows
from lit_shortcut.fashion.classifier import FashionCNN, FashionFeatures
from lit_shortcut.metrics.distances import FrechetDistance
from lit_shortcut.networks.shortcut import ShortcutNet
from lit_shortcut.sampling import Decoding, generate
from tests.metrics.brightness import Brightness
from tests.metrics.reference import write_reference
from tests.report.made import conditions

IDENTITY = {"base": {"fingerprint": "0123"}, "decoding": {"guidance": 2.8}, "conditions": {"num_images": 10}}
PASSES = {"mean": 6.0, "low": 6, "high": 6}
DECODING = Decoding(num_steps=6)


def shortcut(seed: int, **arguments: Any) -> Shortcut:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Shortcut(ShortcutNet(width=16, num_heads=2), **arguments)


def row_of(*entry: Any, **methods: Any) -> Row:
    (row,) = build_rows([entry], DECODING, {"hold": Hold()} | methods)
    return row


def identity(row: Row, base: Any = None, *, precision: str = "32-true", compiled: bool = False) -> dict[str, Any]:
    loops = loop_identities(base or ToyBase(), [row], precision=precision, compiled=compiled)
    return row_identity(loops[row.name], ClassLabels(10).identity(), {"brightness": Brightness()})


# ---- drawing


def test_images_are_those_of_the_decoded_tokens_and_passes_are_counted() -> None:
    base, row = ToyBase(), row_of(4, 2, "hold")
    (conditions,) = ClassLabels(3, batch_size=3).loader()
    drawn = draw_row(base, conditions, row)
    assert torch.equal(drawn.images, base.decode(generate(base, conditions, row.decoding, row.acceleration).tokens))
    assert drawn.full_steps.tolist() == [2, 2, 2]


def test_what_can_be_run_passes() -> None:
    base = ToyBase()
    own = shortcut(0, base_fingerprint=base.fingerprint)
    rows = [row_of(8), row_of(6, 6, "hold"), row_of(6, 1, "own", own=own), row_of(6, {"guidance": 0})]
    require_feasible(base, rows, ClassLabels(12, batch_size=5))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (row_of(17), r"vanilla_n17: num_steps must lie in 1\.\.16"),
        (row_of(16), "schedule 'arccos' cannot spend 16 tokens in 16 steps"),
        (row_of(6, [0, 6], "hold"), r"hold_n6_b2_steps0-6: steps must lie in 0\.\.5"),
        (row_of(6, 2, "own", own=shortcut(0, base_fingerprint="other")), "own_n6_b2: .*base other"),
    ],
)
def test_row_that_cannot_be_run_is_refused_by_name(row: Row, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        require_feasible(ToyBase(), [row_of(6), row], ClassLabels(2))


def test_class_that_only_a_late_batch_asks_for_is_refused() -> None:
    with pytest.raises(ValueError, match=r"class labels must lie in 0\.\.9; got \[10\]"):
        require_feasible(ToyBase(), [row_of(6)], ClassLabels(11, batch_size=5, num_classes=11))


# ---- identity


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        (lambda: identity(row_of(6, 2, "hold"), ToyBase(seed=1)), "base.fingerprint"),
        (lambda: identity(row_of(6, 2, "hold", {"guidance": 1.0})), "decoding.guidance"),
        (lambda: identity(row_of(6, 2, "hold", {"order": "halton"})), "decoding.order"),
        (lambda: identity(row_of(5, 2, "hold")), "decoding.num_steps"),
        (lambda: identity(row_of(6, 3, "hold")), "acceleration.budget"),
        (lambda: identity(row_of(6, 2, "hold", "early")), "acceleration.plan"),
        (lambda: identity(row_of(6, 2, "hold", hold=shortcut(0))), "acceleration.weights"),
        (lambda: identity(row_of(6, 2, "hold"), ToyBase().bfloat16()), "dtype was 'float32' and is 'bfloat16'"),
        (lambda: identity(row_of(6, 2, "hold"), precision="bf16-mixed"), "precision"),
        (lambda: identity(row_of(6, 2, "hold"), compiled=True), "compiled was False and is True"),
        (
            lambda: identity(row_of(6, 2, "hold", hold=shortcut(0, dtype="bfloat16"))),
            "acceleration.dtype was nothing and is 'bfloat16'",
        ),
    ],
)
def test_identity_holds_what_values_depend_on_and_says_what_differs(changed: Any, what: str) -> None:
    same = identity(row_of(6, 2, "hold"))
    assert identity(row_of(6, 2, "hold")) == same
    assert what in "; ".join(differences(same, changed()))


@pytest.mark.parametrize("field", ["template", "negative"])
def test_prompt_template_is_part_of_the_identity(field: str) -> None:
    one, other = toy_dimoo(), toy_dimoo()
    setattr(other, field, "a blurry {}" if field == "template" else "blurry")
    changes = differences(identity(row_of(6), one), identity(row_of(6), other))
    assert [change.split(" was ")[0] for change in changes] == [f"base.{field}"]


def test_reference_of_a_metric_is_part_of_the_identity(tmp_path: Path) -> None:
    metrics, extractor = [], FashionFeatures(FashionCNN(width=2))
    for seed in (0, 1):
        images = torch.randint(256, (9, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
        write_reference(tmp_path / f"{seed}.safetensors", extractor, [images], "noise")
        metrics.append({"fid": FrechetDistance(extractor, tmp_path / f"{seed}.safetensors")})
    one, other = (row_identity({}, {}, measured) for measured in metrics)
    assert [change.split(" was ")[0] for change in differences(one, other)] == ["metrics.fid.reference"]


def test_shortcuts_of_one_name_differ_in_identity_when_their_weights_do() -> None:
    one, same, other = (identity(row_of(6, 2, "own", own=shortcut(seed))) for seed in (0, 0, 1))
    assert one == same != other


# ---- results


def test_finished_row_is_found_under_an_equal_identity_only(tmp_path: Path) -> None:
    results, row = Results(tmp_path), row_of(6)
    assert results.find(row, 0, IDENTITY) is None
    results.add(row, 0, IDENTITY, {"fid": 1.5}, PASSES)
    found = Results(tmp_path).find(row, 0, IDENTITY)
    assert found is not None
    assert (found["values"], found["full_steps"]) == ({"fid": 1.5}, PASSES)
    assert results.find(row, 1, IDENTITY) is None
    assert results.find(row_of(7), 0, IDENTITY) is None
    for name in IDENTITY:
        assert results.find(row, 0, IDENTITY | {name: "another"}) is None


def test_plans_of_one_budget_have_files_of_their_own(tmp_path: Path) -> None:
    results = Results(tmp_path)
    for entry in ([6, 3, "hold"], [6, 3, "hold", "early"], [6, [0, 1, 2], "hold"]):
        results.add(row_of(*entry), 0, IDENTITY, {}, PASSES)
        results.add_images(row_of(*entry), torch.zeros(1, 3, 2, 2, dtype=torch.uint8), conditions("a coat"))
    assert len(list((tmp_path / "rows").iterdir())) == len(list((tmp_path / "images").glob("*.png"))) == 3


def test_row_measured_again_replaces_the_old_one_and_the_log_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("lit_shortcut.evaluation.results.rank_zero_info", said.append)
    results, row, other = Results(tmp_path), row_of(6), IDENTITY | {"conditions": {"num_images": 20}}
    results.add(row, 0, IDENTITY, {"fid": 1.5}, PASSES)
    assert results.find(row, 0, other) is None
    assert said == ["vanilla_n6, seed 0: measured again, since conditions.num_images was 10 and is 20"]
    results.add(row, 0, other, {"fid": 1.2}, PASSES)
    assert results.find(row, 0, other) is not None
    assert [path.name for path in (tmp_path / "rows").iterdir()] == ["vanilla_n6_seed0.json"]


@pytest.mark.parametrize("content", [b"", b'{"identity": {', b"\xff\xfe\x00"], ids=["empty", "cut short", "no text"])
def test_damaged_result_is_named(tmp_path: Path, content: bytes) -> None:
    results, row = Results(tmp_path), row_of(6)
    results.add(row, 0, IDENTITY, {}, PASSES)
    (tmp_path / "rows" / "vanilla_n6_seed0.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"vanilla_n6_seed0\.json"):
        results.find(row, 0, IDENTITY)


def test_strip_of_images_keeps_their_pixels_side_by_side(tmp_path: Path) -> None:
    images = torch.randint(256, (3, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    results = Results(tmp_path)
    results.add_images(row_of(6), images, conditions(*"abc"))
    strip = torchvision.io.read_image(str(results.images_path(row_of(6))))
    assert strip.shape == (3, 10, 28)
    for k in range(3):
        assert torch.equal(strip[:, 1:9, 1 + 9 * k : 9 + 9 * k], images[k])
    assert bool((strip[:, 0] == 255).all())
