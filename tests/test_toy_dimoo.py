"""The four verbs on a tiny random Lumina-DiMOO: prompts in, trajectories, a shortcut, measured rows out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lit_shortcut.acceleration.shortcut import Shortcut
from lit_shortcut.bases.dimoo.toy import toy_dimoo
from lit_shortcut.networks.llada_shortcut import LLaDAShortcutNet
from lit_shortcut.networks.shortcut import ShortcutNet
from lit_shortcut.trajectory import Card, TrajectoryError, read_shard
from lit_shortcut.trajectory.index import check_shards
from lit_shortcut.weights import WeightsError, save_module
from tests.command_line import CONFIGS, lightning, run_verbs

TOY_DIMOO = CONFIGS / "toy_dimoo"
PROMPTS = (TOY_DIMOO / "prompts.txt").read_text().splitlines()
EXPORTED = "runs/toy_dimoo/shortcut/shortcut.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where predict, fit, validate and test ran."""
    return run_verbs(tmp_path_factory.mktemp("toy_dimoo"), "toy_dimoo")


def test_predict_records_a_trajectory_for_each_prompt_in_turn(folder: Path) -> None:
    source = folder / "runs/toy_dimoo/trajectories"
    card = Card.read(source)
    check_shards(source, card)
    assert (card.num_samples, card.num_classes, len(card.prompts)) == (10, len(PROMPTS), 64)
    recorded = [one for shard in range(card.num_shards) for one in read_shard(source, shard, card)]
    assert [one.conditions.prompts[0] for one in recorded] == (PROMPTS * 2)[:10]
    assert all(one.prefix is not None and int(one.prefix.lengths[0, 1]) == 3 for one in recorded)


def test_set_of_other_prompts_is_not_gone_on_with(folder: Path, tmp_path: Path) -> None:
    others = tmp_path / "others.txt"
    others.write_text("\n".join(reversed(PROMPTS)))
    with pytest.raises(TrajectoryError, match=r"holds another set: prompts was '[0-9a-f]{64}' and is '[0-9a-f]{64}'\."):
        lightning(folder, "predict", "--config", TOY_DIMOO / "extract.yaml", f"--data.path={others}")


def test_fit_exports_a_shortcut_tied_to_its_base(folder: Path) -> None:
    exported = Shortcut.load(folder / EXPORTED)
    assert isinstance(exported.network, LLaDAShortcutNet)
    assert exported.identity() == Shortcut.load(folder / "runs/toy_dimoo/shortcut/last.ckpt").identity()
    assert exported.base_fingerprint == toy_dimoo().fingerprint


def test_measured_rows_know_their_prompts_and_the_images_size(folder: Path) -> None:
    rows = {path.stem: json.loads(path.read_text()) for path in (folder / "runs/toy_dimoo/report/rows").iterdir()}
    assert rows.keys() == {"vanilla_n6_seed0", "shortcut_n6_b2_seed0"}
    card = Card.read(folder / "runs/toy_dimoo/trajectories")
    assert {row["identity"]["conditions"]["prompts"] for row in rows.values()} == {card.prompts}
    assert all(row["identity"]["base"] == toy_dimoo().identity() for row in rows.values())
    latency = json.loads((folder / "runs/toy_dimoo/report/latency.json").read_text())
    assert latency["measured"].keys() == {"vanilla_n6", "shortcut_n6_b2"}


def test_shortcut_of_maskgit_is_refused_before_anything_is_run(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "configs").symlink_to(CONFIGS)
    torch.manual_seed(0)
    save_module(tmp_path / EXPORTED, ShortcutNet(16, num_heads=2))
    with pytest.raises(WeightsError, match=r"DiMOO: .* expected a LLaDAShortcutNet, found a ShortcutNet"):
        lightning(tmp_path, "test", "--config", TOY_DIMOO / "evaluate.yaml", "--trainer.logger=false")
    assert not (tmp_path / "runs/toy_dimoo/report").exists()


def test_prompt_longer_than_the_context_is_refused_by_the_command(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("a prompt of more than thirty bytes\n")
    with pytest.raises(ValueError, match=r"at most 32 tokens, template included; 'a prompt of more.*has 36"):
        lightning(tmp_path, "predict", "--config", TOY_DIMOO / "extract.yaml", f"--data.path={path}")
