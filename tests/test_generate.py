"""The verb ``generate``: from a prompt to a picture on the disk."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from lit_shortcut import load
from lit_shortcut.acceleration.predictors import Hold
from lit_shortcut.bases.toy import ToyBase
from lit_shortcut.sampling import Decoding
from lit_shortcut.tasks.generating import GenerateTask
from lit_shortcut.trainer import Trainer
from lit_shortcut.weights import WeightsError
from tests.command_line import CONFIGS, TOY, lightning

CHECKPOINTS = CONFIGS.parent / "checkpoints"
TEXT_BASE = json.loads((CHECKPOINTS / "fashion_text/shortcut/config.json").read_text())["base"]["fingerprint"]
QUIET = ("--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "checkpoints").symlink_to(CHECKPOINTS)
    return tmp_path


def generate(folder: Path, *words: object, base: str = "fashion", quiet: tuple[str, ...] = QUIET) -> Path:
    """Run the command in ``folder``; returns where its pictures are."""
    lightning(folder, "generate", "--config", CONFIGS / base / "generate.yaml", *quiet, *words)
    return folder / "runs" / base / "pictures"


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def text(path: Path) -> dict[str, str]:
    with Image.open(path) as image:
        found: dict[str, str] = image.text  # type: ignore[attr-defined]
        return found


def pixels(image: Image.Image) -> torch.Tensor:
    return pil_to_tensor(image)


def test_command_draws_what_the_pipeline_draws(folder: Path) -> None:
    words = ("--prompt", "a dark, wide coat", "--budget", 3, "--num_images", 2, "--seed", 5, "--batch_size", 1)
    pictures = generate(folder, *words, base="fashion_text")
    assert files(pictures).keys() == {"000000.png", "000001.png", "grid.png", "settings.json"}
    drawn = load(CHECKPOINTS / "fashion_text", budget=3)(["a dark, wide coat"] * 2, seeds=[5, 6])
    for index, image in enumerate(drawn.images):
        path = pictures / f"{index:06d}.png"
        assert torch.equal(pixels(Image.open(path)), pixels(image))
        found = text(path)
        assert (found["prompt"], found["seed"]) == ("a dark, wide coat", str(5 + index))
        assert (found["base_passes"], found["budget"], found["num_steps"], found["method"]) == (
            "3",
            "3",
            "16",
            "shortcut",
        )
        assert json.loads(found["base"])["fingerprint"] == TEXT_BASE


def test_vanilla_is_drawn_beside_at_equal_seeds(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        pictures = generate(folder, "--labels", "0,7", "--budget", 2, "--compare", "--num_images", 3)
    vanilla = load(CHECKPOINTS / "fashion", budget=16)(labels=[0, 7, 0]).images
    for index, image in enumerate(vanilla):
        path = pictures / f"{index:06d}_vanilla.png"
        assert torch.equal(pixels(Image.open(path)), pixels(image))
        assert (text(path)["base_passes"], text(path)["label"]) == ("16", str([0, 7, 0][index]))
        assert text(pictures / f"{index:06d}.png")["base_passes"] == "2"
    grid = pixels(Image.open(pictures / "grid.png"))
    assert torch.equal(grid[:, :28, :28], pixels(vanilla[0]))
    assert torch.equal(grid[:, :28, 30:58], pixels(Image.open(pictures / "000000.png")))
    assert "vanilla_n16: 16 of 16 base passes" in caplog.text
    assert "shortcut_n16_b2_early: 2 of 16 base passes" in caplog.text


def test_progress_in_a_terminal_runs_over_steps(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    words = ("--labels", "3", "--num_images", 2, "--batch_size", 1, "--compare", "--budget", 4)
    generate(folder, *words, quiet=("--trainer.accelerator=cpu",))
    written = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", capsys.readouterr().out)  # colours and moves of the cursor
    assert "64/64 steps" in written  # two batches of 16 steps, twice each


def test_prompts_of_a_file_are_drawn_in_turn(folder: Path) -> None:
    (folder / "prompts.jsonl").write_text('"a bag"\n{"prompt": "größere Schuhe"}\n')
    words = ("--prompts", folder / "prompts.jsonl", "--num_images", 3, "--num_steps", 2, "--budget", 2)
    pictures = generate(folder, *words, base="fashion_text")
    prompts = [text(pictures / f"{index:06d}.png")["prompt"] for index in range(3)]
    assert prompts == ["a bag", "größere Schuhe", "a bag"]


@pytest.mark.parametrize("prompt", ["true", "a: b", "[a, b]", "5", "{a: b}", "-"])
def test_prompt_is_taken_as_it_is_written(folder: Path, prompt: str) -> None:
    pictures = generate(folder, f"--prompt={prompt}", "--num_steps=1", "--budget=1", base="fashion_text")
    assert text(pictures / "000000.png")["prompt"] == prompt


def test_same_settings_draw_into_the_same_folder_again(folder: Path) -> None:
    before = files(generate(folder, "--labels", "1", "--budget", 2))
    assert files(generate(folder, "--labels", "1", "--budget", 2)) == before


def test_pictures_of_other_settings_are_kept_unless_overwritten(folder: Path) -> None:
    pictures = generate(folder, "--labels", "1,2", "--budget", 2)
    before = files(pictures)
    with pytest.raises(ValueError, match=r"runs/fashion/pictures: .*labels was \[1, 2\] and is \[3\]"):
        generate(folder, "--labels", "3", "--budget", 2)
    assert files(pictures) == before
    generate(folder, "--labels", "3", "--budget", 2, "--overwrite")
    assert files(pictures).keys() == {"000000.png", "grid.png", "settings.json"}
    assert text(pictures / "000000.png")["label"] == "3"


def test_folder_of_something_else_is_left_alone(folder: Path) -> None:
    (folder / "thesis").mkdir()
    (folder / "thesis" / "chapter.txt").write_text("…")
    with pytest.raises(ValueError, match=r"thesis: holds other results \(chapter.txt"):
        generate(folder, "--labels", "3", "--output", folder / "thesis")
    assert files(folder / "thesis").keys() == {"chapter.txt"}


@pytest.mark.parametrize(
    ("base", "words", "named"),
    [
        ("fashion", (), "neither"),
        ("fashion", ("--prompt", "a coat"), "labels in 0..9"),
        ("fashion_text", ("--labels", "1"), "takes prompts"),
        ("fashion", ("--labels", "1,x"), "'1,x'"),
        ("fashion", ("--labels", "10"), "10"),
        ("fashion", ("--labels", "1", "--budget", 17), "1..16"),
        ("fashion", ("--labels", "1", "--budget", 0), "1..16"),
        ("fashion", ("--labels", "1", "--num_steps", 8, "--budget", 3), "num_steps 16"),
        ("fashion", ("--labels", "1", "--seed", 2**63), "64 bits"),
        ("fashion_text", ("--prompt", " "), "prompt 1"),
        ("fashion_text", ("--prompt", "coat " * 40), "at most 32 tokens"),
        ("fashion_text", ("--prompts", "wishes.csv"), "wishes.csv"),
    ],
)
def test_bad_request_is_refused_before_anything_is_written(
    folder: Path, base: str, words: tuple[Any, ...], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        generate(folder, *words, base=base)
    assert not (folder / "runs").exists()


def test_shortcut_of_another_base_is_refused(folder: Path) -> None:
    path = CHECKPOINTS / "fashion_text" / "shortcut" / "model.safetensors"
    with pytest.raises(WeightsError, match=rf"{TEXT_BASE}.*cannot accelerate base"):
        generate(folder, "--labels", "1", f"--model.shortcut.init_args.path={path}")


def test_other_tasks_cannot_generate(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="GenerateTask, got"):
        lightning(tmp_path, "generate", "--config", TOY / "extract.yaml")


def test_one_call_leaves_the_next_with_the_tasks_own_settings(tmp_path: Path) -> None:
    task = GenerateTask(ToyBase(), decoding=Decoding(num_steps=4), shortcut=Hold(), budget=2)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    own = [row.name for row in task.rows]
    for number, (asked, rows) in enumerate([({"num_steps": 3, "budget": 1, "compare": True}, 2), ({}, 1)]):
        trainer.generate(task, labels=1, output=tmp_path / str(number), **asked)
        assert [row.name for row in task.rows] == own
        settings = json.loads((tmp_path / str(number) / "settings.json").read_text())
        assert len(settings["methods"]) == rows


def test_data_has_no_place_in_generate(folder: Path) -> None:
    with pytest.raises(MisconfigurationException, match="leave data out"):
        generate(folder, "--labels=1", "--data=datamodules.conditions.ClassLabels", "--data.num_images=2")


def test_damaged_settings_are_named(folder: Path) -> None:
    pictures = generate(folder, "--labels", "1", "--budget", 2)
    (pictures / "settings.json").write_text("{")
    with pytest.raises(ValueError, match=r"settings.json: not a settings file"):
        generate(folder, "--labels", "1", "--budget", 2)
