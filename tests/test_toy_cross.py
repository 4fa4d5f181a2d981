"""The four verbs on a base that sees its prompt by cross-attention: prompts, but no text rows in the features."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lit_shortcut.bases.toy_cross import CrossToyBase
from lit_shortcut.trajectory import Card, problems, read_shard
from tests.command_line import run_verbs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where predict, fit, validate and test ran."""
    return run_verbs(tmp_path_factory.mktemp("toy_cross"), "toy_cross")


def test_set_has_prompts_and_no_text_rows(folder: Path) -> None:
    source = folder / "runs/toy_cross/trajectories"
    card = Card.read(source)
    assert (bool(card.prompts), card.text_rows) == (True, False)
    assert card.base == CrossToyBase().identity()
    assert list(problems(source)) == []
    assert all(one.prefix is None and one.conditions.prompts for one in read_shard(source, 0, card))


def test_rows_are_measured(folder: Path) -> None:
    report = folder / "runs/toy_cross/report"
    rows = {path.stem: json.loads(path.read_text()) for path in (report / "rows").iterdir()}
    assert set(rows) == {"vanilla_n6_seed0", "shortcut_n6_b2_seed0"}
    assert all(row["identity"]["base"] == CrossToyBase().identity() for row in rows.values())
