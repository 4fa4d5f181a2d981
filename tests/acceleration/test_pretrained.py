"""A shortcut as a folder, and as a repository of the hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub.errors import LocalEntryNotFoundError

from lit_shortcut import load
from lit_shortcut.acceleration.calibrated import PlanFile, SearchedSteps
from lit_shortcut.acceleration.card import write_card
from lit_shortcut.acceleration.origin import BaseReference, Origin, read_config
from lit_shortcut.acceleration.shortcut import Shortcut
from lit_shortcut.bases.maskgit.adapter import MaskGIT
from lit_shortcut.cli import main
from lit_shortcut.decoding.schedules import tokens_per_step
from lit_shortcut.networks.shortcut import ShortcutNet
from lit_shortcut.pictures import row_of
from lit_shortcut.sampling import Decoding
from lit_shortcut.weights import WeightsError, fingerprint, load_tensors

CHECKPOINTS = Path(__file__).parents[2] / "checkpoints"
SHIPPED = CHECKPOINTS / "fashion" / "shortcut"
ORIGIN = Origin(
    BaseReference("0123", "dimoo", "hf://owner/base", "v2", {"height": 512}),
    num_steps=5,
    decoding={"num_steps": 5, "guidance": 1.0},
    budget=2,
    licence="Apache-2.0",
    trained_on="trajectories",
)


@pytest.fixture
def shortcut() -> Shortcut:
    return Shortcut(ShortcutNet(width=16, num_heads=2), "0123", origin=ORIGIN)


def front_matter(card: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(card.read_text(encoding="utf-8").split("---\n")[1])
    return found


def test_saved_folder_comes_back(shortcut: Shortcut, tmp_path: Path) -> None:
    shortcut.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "config.json", "README.md"}
    for found in (Shortcut.from_pretrained(tmp_path), Shortcut.load(tmp_path)):
        assert found.origin == ORIGIN
        assert found.base_fingerprint == "0123"
        assert found.network.hparams == shortcut.network.hparams
        assert fingerprint(found.network.state_dict()) == fingerprint(shortcut.network.state_dict())
        assert not any(parameter.requires_grad for parameter in found.parameters())
    half = Shortcut.from_pretrained(tmp_path, dtype="bfloat16")
    assert next(half.parameters()).dtype == torch.bfloat16
    assert half.identity() == Shortcut.from_pretrained(tmp_path).identity()  # calibrated plans name the weights
    by_itself = Shortcut.load(tmp_path / "model.safetensors").origin
    assert (by_itself.base.fingerprint, by_itself.num_steps, by_itself.decoding) == ("0123", 5, ORIGIN.decoding)


def test_card_names_base_and_licence_for_the_hub(shortcut: Shortcut, tmp_path: Path) -> None:
    shortcut.save_pretrained(tmp_path)
    found = front_matter(tmp_path / "README.md")
    assert (found["license"], found["base_model"], found["library_name"]) == (
        "apache-2.0",
        "owner/base",
        "lit-shortcut",
    )
    assert "budget=2" in (tmp_path / "README.md").read_text()


def test_card_holds_the_table_and_the_pictures_of_a_report(tmp_path: Path) -> None:
    folder = tmp_path / "shortcut"
    shutil.copytree(SHIPPED, folder)
    report = tmp_path / "report"
    report.mkdir()
    (report / "report.md").write_text("| method | N |\n|---|---|\n| shortcut | 8 |\n")
    (report / "pareto.png").write_bytes(b"a plot")
    main(["card", str(folder), str(report)])
    text = (folder / "README.md").read_text()
    assert "| shortcut | 8 |" in text
    assert "![pareto](pareto.png)" in text
    assert (folder / "pareto.png").read_bytes() == b"a plot"
    saved = tmp_path / "saved"
    Shortcut.from_pretrained(folder).save_pretrained(saved)
    for name in ("README.md", "pareto.png"):
        assert (saved / name).read_bytes() == (folder / name).read_bytes()
    assert read_config(saved)[1] == read_config(folder)[1]


def test_card_without_a_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"report\.md"):
        write_card(SHIPPED, tmp_path)


def test_push_uploads_the_folder(shortcut: Shortcut, monkeypatch: pytest.MonkeyPatch) -> None:
    uploaded: dict[str, Any] = {}

    def upload(self: object, *, repo_id: str, folder_path: Path, **kwargs: object) -> str:
        uploaded.update({path.name: path.read_bytes() for path in Path(folder_path).iterdir()}, repo_id=repo_id)
        return "url"

    class Repository:
        repo_id = "owner/shortcut"

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, **kwargs: Repository)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    assert shortcut.push_to_hub("owner/shortcut") == "url"
    assert uploaded["repo_id"] == "owner/shortcut"
    assert json.loads(uploaded["config.json"])["base"]["source"] == "hf://owner/base"
    assert {"model.safetensors", "README.md"} <= uploaded.keys()


@pytest.mark.parametrize(
    ("address", "revision"), [("owner/shortcut", None), ("hf://owner/shortcut", None), ("hf://owner/shortcut@v1", "v1")]
)
def test_repository_is_fetched_at_its_revision(
    monkeypatch: pytest.MonkeyPatch, address: str, revision: str | None
) -> None:
    asked: list[tuple[str, str | None]] = []

    def fetch(repo_id: str, **options: Any) -> str:
        asked.append((repo_id, options["revision"]))
        return str(SHIPPED)

    monkeypatch.setattr("lit_shortcut.acceleration.shortcut.snapshot_download", fetch)
    monkeypatch.setattr("huggingface_hub.hub_mixin.hf_hub_download", lambda **options: str(SHIPPED / "config.json"))
    assert Shortcut.from_pretrained(address).origin.num_steps == 16
    assert asked == [("owner/shortcut", revision)]
    assert load(address, budget=2)(labels=[3]).full_steps.tolist() == [2]


def test_repository_out_of_reach_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**options: Any) -> str:
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr("huggingface_hub.hub_mixin.hf_hub_download", fail)
    with pytest.raises(WeightsError, match=r"owner/shortcut: .*hf download owner/shortcut"):
        Shortcut.from_pretrained("owner/shortcut")


def test_shipped_folders_name_their_base_and_measurements() -> None:
    for name in ("fashion", "fashion_text"):
        folder = CHECKPOINTS / name / "shortcut"
        _, origin = read_config(folder)
        assert (origin.base.name, origin.base.source, origin.licence) == (name, "..", "Apache-2.0")
        card = (folder / "README.md").read_text()
        assert "speed-up" in card
        for picture in ("grids.png", "pareto.png"):
            assert f"]({picture})" in card
            assert (folder / picture).is_file()


def test_calibrated_plans_lie_beside_the_weights(base: MaskGIT, tmp_path: Path) -> None:
    made = Shortcut(ShortcutNet(width=base.spec.width, num_heads=2), base.fingerprint, origin=Origin(num_steps=5))
    made.save_pretrained(tmp_path)
    shortcut, decoding = Shortcut.from_pretrained(tmp_path), Decoding(num_steps=5)
    with pytest.raises(ValueError, match=r"calibrated needs the plan\.json"):
        row_of(shortcut, "calibrated", 2, decoding)
    counts = tokens_per_step(decoding.schedule, 5, base.spec.num_tokens)
    schedule = SearchedSteps(counts=counts, trajectories=1, steps={"2": [0, 3]}, kl={"2": 0.0})
    PlanFile(shortcut.identity(), base.fingerprint, [schedule]).write(tmp_path / "plan.json")
    row = row_of(Shortcut.from_pretrained(tmp_path), "calibrated", 2, decoding)
    assert row.name == "shortcut_n5_b2_calibrated"
    assert row.acceleration.identity()["plan"] == "calibrated"


def test_what_only_runs_in_another_dtype_is_saved_as_it_was_read(base: MaskGIT, tmp_path: Path) -> None:
    """Its calibrated plan is for those weights."""
    made = Shortcut(ShortcutNet(width=base.spec.width, num_heads=2), base.fingerprint, origin=Origin(num_steps=5))
    made.save_pretrained(tmp_path / "one")
    (tmp_path / "one" / "plan.json").write_text("{}")
    again = Shortcut.from_pretrained(tmp_path / "one", dtype="bfloat16")
    again.save_pretrained(tmp_path / "two")
    one, two = (load_tensors(tmp_path / name / "model.safetensors")[0] for name in ("one", "two"))
    assert fingerprint(one) == fingerprint(two)
    assert (tmp_path / "two" / "plan.json").exists()
    torch.nn.init.ones_(again.network.widen.bias)  # type: ignore[arg-type]
    again.save_pretrained(tmp_path / "three")
    assert not (tmp_path / "three" / "plan.json").exists()
    assert Shortcut.from_pretrained(tmp_path / "three").identity() != made.identity()


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("config.json", None, "config.json: no such file"),
        ("config.json", b"{", "config.json: not a JSON file"),
        ("config.json", b"[]", "format_version 1"),
        ("model.safetensors", None, "model.safetensors: no such weight file"),
        ("model.safetensors", b"x" * 100, "model.safetensors: not a readable"),
    ],
)
def test_damaged_folder_is_named(
    shortcut: Shortcut, tmp_path: Path, name: str, content: bytes | None, named: str
) -> None:
    shortcut.save_pretrained(tmp_path)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=named):
        Shortcut.from_pretrained(tmp_path)


def test_weights_that_do_not_fit_the_configuration_are_refused(shortcut: Shortcut, tmp_path: Path) -> None:
    shortcut.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content["network"]["hparams"]["width"] = 32
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(WeightsError, match=r"(?s)config.json.*size mismatch"):
        Shortcut.from_pretrained(tmp_path)
