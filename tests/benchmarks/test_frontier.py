from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import auto_cli

from benchmarks import frontier, verbs
from lit_shortcut.acceleration.predictors import Hold
from lit_shortcut.evaluation.rows import build_rows
from lit_shortcut.sampling import Decoding
from tests.command_line import CONFIGS, lightning

METHODS: Any = {
    "hold": {"class_path": "lit_shortcut.acceleration.predictors.Hold"},
    "taylor": {"class_path": "lit_shortcut.acceleration.predictors.Taylor", "init_args": {"order": 1}},
}


def report(*, higher_is_better: bool = False, **rows: tuple[float, float]) -> dict[str, Any]:
    """Rows by name with latency and error; as a score where higher is better."""
    sign = -1 if higher_is_better else 1
    lines = [
        {"name": name, "method": name.split("_")[0], "latency_ms": latency, "score": sign * error}
        for name, (latency, error) in rows.items()
    ]
    identities = {name: {"decoding": asdict(decoding_of(name))} for name in rows}
    return {"quality": "score", "higher_is_better": higher_is_better, "rows": lines, "identities": identities}


def decoding_of(name: str) -> Decoding:
    """Decoding of the row ``name``, in a base's own of guidance 3."""
    num_steps = int(name.split("_")[1].removeprefix("n"))
    return Decoding(num_steps, guidance=0.0 if name.endswith("guidance0") else 3.0)


@pytest.mark.parametrize("higher_is_better", [True, False])
def test_only_rows_that_none_of_their_method_beats_are_kept(higher_is_better: bool) -> None:
    entries = [[4], [8], [16], [8, 2, "hold"], [8, 3, "hold"], [8, 4, "hold"]]
    found = report(
        higher_is_better=higher_is_better,
        vanilla_n4=(4, 3.0),
        vanilla_n8=(8, 1.0),
        vanilla_n16=(16, 1.5),
        hold_n8_b2=(2, 9.0),
        hold_n8_b3=(3, 9.5),
        hold_n8_b4=(4, 4.0),  # vanilla in 4 steps beats it, no row of its own does
    )
    assert frontier.best(entries, found, METHODS) == [[4], [8], [8, 2, "hold"], [8, 4, "hold"]]


@pytest.mark.parametrize("higher_is_better", [True, False])
def test_of_decodings_that_cost_the_same_only_the_best_counts(higher_is_better: bool) -> None:
    entries = [[8], [8, 2, "hold"], [8, 2, "hold", {"guidance": 1.0}], [8, 2, "hold", {"guidance": 0.0}]]
    found = report(
        higher_is_better=higher_is_better,
        vanilla_n8=(8, 1.0),
        hold_n8_b2=(1.9, 4.0),
        hold_n8_b2_guidance1=(2, 3.0),
        hold_n8_b2_guidance0=(1, 5.0),  # without the unconditional branch
    )
    best = [[8], [8, 2, "hold", {"guidance": 1.0}], [8, 2, "hold", {"guidance": 0.0}]]
    assert frontier.best(entries, found, METHODS) == best


def test_of_plans_that_cost_the_same_only_the_best_counts() -> None:
    entries: list[Any] = [[8], [8, 2, "hold", "even"], [8, 2, "hold", "early"]]
    found = report(vanilla_n8=(8, 1.0), hold_n8_b2=(1.9, 4.0), hold_n8_b2_early=(2, 3.0))
    assert frontier.best(entries, found, METHODS) == [[8], [8, 2, "hold", "early"]]


def test_what_a_row_costs_follows_from_the_base_s_own_decoding() -> None:
    """Its order differs from the default one, so a row that names the default costs something else."""
    entries: list[Any] = [[8], [8, {"order": "confidence"}]]
    found = report(vanilla_n8=(8, 2.0), vanilla_n8_confidence=(9, 1.0))
    assert frontier.best(entries, found, METHODS) == [[8, {"order": "confidence"}]]
    found["identities"]["vanilla_n8"]["decoding"]["order"] = "halton"
    assert frontier.best(entries, found, METHODS) == entries


def test_plans_of_ones_own_are_known_by_name() -> None:
    entries: list[Any] = [[8], [8, 2, "hold", "mine"]]
    found = report(vanilla_n8=(8, 1.0), hold_n8_b2_mine=(2, 3.0))
    assert frontier.best(entries, found, METHODS, ["mine"]) == entries


def test_files_that_arguments_name_are_told_by_their_content(tmp_path: Path) -> None:
    (tmp_path / "network").mkdir()
    (tmp_path / "network" / "model.safetensors").write_bytes(b"one")
    arguments = {"shortcut": {"class_path": "a.B", "init_args": {"path": str(tmp_path / "network"), "order": 1}}}
    before = verbs.digests(arguments)
    assert [Path(path).name for path in before] == ["model.safetensors"]
    (tmp_path / "network" / "model.safetensors").write_bytes(b"two")
    assert verbs.digests(arguments).keys() == before.keys()
    assert verbs.digests(arguments) != before


def test_files_that_a_configuration_names_are_told_by_their_content(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "report.md").write_text("changes with every run")
    (tmp_path / "parts" / "decoding.yaml").write_text("guidance: 1.5\n")
    config = {"decoding": "parts/decoding.yaml", "results": "results", "name": "", "about": "a" * 300}
    (tmp_path / "evaluate.yaml").write_text(yaml.safe_dump(config))
    before = verbs.digests([str(tmp_path / "evaluate.yaml")])
    assert sorted(Path(path).name for path in before) == ["decoding.yaml", "evaluate.yaml"]
    (tmp_path / "parts" / "decoding.yaml").write_text("guidance: 2.0\n")
    assert verbs.digests([str(tmp_path / "evaluate.yaml")]) != before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quality": None}, "needs a quality"),
        ({"rows": [{"name": "vanilla_n8", "method": "vanilla", "latency_ms": 1, "score": 1}]}, "hold: no row has both"),
        ({"rows": [{"name": "vanilla_n8", "method": "vanilla", "score": 1}]}, "hold, vanilla: .* latency_ms and score"),
    ],
)
def test_reports_without_latency_or_quality_are_refused(change: dict[str, Any], message: str) -> None:
    found = report(vanilla_n8=(8, 1.0), hold_n8_b2=(2, 4.0)) | change
    with pytest.raises(ValueError, match=message):
        frontier.best([[8], [8, 2, "hold"]], found, METHODS)


@pytest.mark.parametrize("path", (CONFIGS.parent / "benchmarks").glob("frontier_*.yaml"), ids=lambda path: path.stem)
def test_frontiers_of_the_defaults_are_asked_of_the_command(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, ...]] = []

    def run(*words: str) -> None:
        asked.append(words)
        raise StopIteration

    monkeypatch.setattr(verbs, "run", run)
    with pytest.raises(StopIteration):
        auto_cli(frontier.main, args=[f"--config={path}", f"--folder={tmp_path}"])
    (words,) = asked
    overlay = yaml.safe_load(next(tmp_path.glob("*/sweep.yaml")).read_text())
    methods, rows = (overlay["model"]["init_args"][name] for name in ("methods", "rows"))
    decodings = yaml.safe_load(path.read_text())["decodings"]
    assert len(build_rows([*rows, *([[8, own] for own in decodings])], Decoding(), dict.fromkeys(methods, Hold()))) > 20
    with pytest.raises(SystemExit, match="0"):
        lightning(CONFIGS.parent, *words, "--print_config")


def test_methods_are_swept_and_the_best_rows_measured_on_other_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "configs").symlink_to(CONFIGS)
    monkeypatch.chdir(tmp_path)
    parts: list[str] = []

    def run(*words: str) -> None:
        parts.append(Path(words[-2]).stem)
        lightning(tmp_path, *words)

    monkeypatch.setattr(verbs, "run", run)
    measure = partial(
        frontier.main,
        "toy",
        METHODS,
        num_steps=[3, 6],
        budgets=[2, 4],
        plans=["even", "early"],
        decodings=[{"confidence_noise": 1.0}],
        selection=frontier.Seeds(8, [5]),
        evaluation=frontier.Seeds(8, [10, 11]),
        only={"hold": [6]},
    )
    measure()
    folder = Path("runs/frontier/toy")
    sweep, final = (json.loads((folder / part / "report.json").read_text()) for part in ("sweep", "report"))
    first, second = (json.loads((folder / f"{part}.json").read_text())[1] for part in ("first", "second"))
    best, kept = (
        [row.name for row in build_rows(entries, Decoding(), dict.fromkeys(METHODS, Hold()))]
        for entries in (first, second)
    )
    plain = {"vanilla_n3", "vanilla_n6"} | {
        f"{method}_n{steps}_b{budget}{plan}"
        for method in METHODS
        for steps, budget in ((3, 2), (6, 2), (6, 4))
        if (method, steps) != ("hold", 3)
        for plan in ("", "_early")
    }
    assert {row["name"] for row in sweep["rows"]} == plain | {f"{name}_confidence_noise1" for name in best}
    assert final["seeds"] == [10, 11]
    assert [row["name"] for row in final["rows"]] == kept
    assert {row["method"] for row in final["rows"]} == {"vanilla", "hold", "taylor"}
    assert [6] in first
    assert [6] in second  # what speed-ups refer to
    measure()
    assert parts == ["sweep", "sweep", "report", "report"]  # what was chosen is kept
    overlay = tmp_path / "colder.yaml"
    overlay.write_text("model: {init_args: {decoding: {temperature: 0.9}}}")

    def refuse(*words: str) -> None:
        raise RuntimeError(f"asked to run {Path(words[-2]).stem}")

    monkeypatch.setattr(verbs, "run", refuse)
    with pytest.raises(RuntimeError, match="asked to run sweep"):  # other settings, other choices
        measure(overlays=[overlay])


def test_seeds_in_both_sets_are_refused() -> None:
    with pytest.raises(ValueError, match=r"evaluation\.run_seeds must not be .*: \[5\]"):
        frontier.main("toy", METHODS, [3, 6], [2], ["even"], [], frontier.Seeds(8, [5]), frontier.Seeds(8, [5, 6]))


def test_steps_of_an_unknown_method_are_refused() -> None:
    seeds = frontier.Seeds(8, [5]), frontier.Seeds(8, [6])
    with pytest.raises(ValueError, match="only must name methods, hold, taylor; got linear"):
        frontier.main("toy", METHODS, [3, 6], [2], ["even"], [], *seeds, only={"linear": [3]})
