from __future__ import annotations

import importlib
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks import ablations, verbs
from tests.command_line import CONFIGS, lightning, record_toy

ROOT = CONFIGS.parent
VARIANTS: Any = {
    "plain": {},
    "blind": {"network": {"uses_control": False, "anchored": True, "rows": "all"}, "data": {"max_gap": 2}},
}


@pytest.mark.parametrize("base", ["fashion", "fashion_text"])
def test_variants_of_the_defaults_fit_their_networks(base: str) -> None:
    asked = yaml.safe_load((ROOT / "benchmarks" / f"ablations_{base}.yaml").read_text())
    network = yaml.safe_load((CONFIGS / base / "fit.yaml").read_text())["model"]["init_args"]["network"]
    module, _, name = network["class_path"].rpartition(".")
    made: Any = getattr(importlib.import_module(module), name)
    for changes in asked["variants"].values():
        made(**network["init_args"] | changes.get("network", {}))


def test_variants_are_trained_and_compared_in_one_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record_toy(tmp_path)
    (tmp_path / "configs").symlink_to(CONFIGS)
    monkeypatch.chdir(tmp_path)
    run_verbs: list[str] = []

    def run(*words: str) -> None:
        run_verbs.append(words[0])
        lightning(tmp_path, *words)

    monkeypatch.setattr(verbs, "run", run)
    measure = partial(
        ablations.main, "toy", VARIANTS, num_steps=6, budgets=[2, 3], max_steps=4, num_images=8, image_budgets=[3]
    )
    measure()
    rows = json.loads(Path("runs/ablations/toy/ablations.json").read_text())["rows"]
    assert [row["variant"] for row in rows] == ["plain", "blind"]
    assert rows[0]["KL, b = 2"] != rows[1]["KL, b = 2"]
    assert all(row["KL, b = 2"] > row["KL, b = 3"] > 0 for row in rows)
    assert all(0 <= row["class_agreement, b = 3"] <= 1 for row in rows)
    assert rows[0].keys() == {
        "variant", "KL, b = 2", "KL, b = 3", "class_agreement, b = 3", "a step's cost",
    }  # fmt: skip
    printed = capsys.readouterr().out
    assert "| blind" in printed
    assert "(hold: " in printed
    assert "The base itself in 6 steps: class_agreement 0." in printed
    assert all(row["a step's cost"] > 0 for row in rows)
    measurements = ["test", "test"]  # of images, and of a step's cost
    assert run_verbs == ["fit", "fit", *measurements]
    measure()
    assert run_verbs[4:] == measurements  # trained variants are kept
    measure(max_steps=5)
    assert run_verbs[6:] == ["fit", "fit", *measurements]
