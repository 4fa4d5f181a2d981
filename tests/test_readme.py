"""What README shows works as it is shown."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

README = (Path(__file__).parents[1] / "README.md").read_text()


def run(example: str) -> dict[str, Any]:
    """The names that the Python example with ``example`` in it leaves behind."""
    (code,) = (one for one in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL) if example in one)
    names: dict[str, Any] = {}
    exec(code, names)
    return names


def test_three_lines_of_python_draw_two_garments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "checkpoints").symlink_to(Path("checkpoints").absolute())
    monkeypatch.chdir(tmp_path)
    pictures = run("from lit_shortcut import load")["pictures"]
    assert [image.size for image in pictures.images] == [(28, 28)] * 2
    assert pictures.full_steps.tolist() == [3, 3]
    assert pictures.log_probs.shape == pictures.tokens.shape
    assert (tmp_path / "coat.png").exists()


def test_python_example_draws_ten_garments() -> None:
    images = run("from lit_shortcut.sampling import")["images"]
    assert isinstance(images, torch.Tensor)
    assert images.shape == (10, 3, 28, 28)
    assert images.dtype == torch.uint8
    assert len(images.unique()) > 50


def test_every_configuration_and_target_it_names_exists() -> None:
    root = Path(__file__).parents[1]
    for name in set(re.findall(r"configs/[\w/]+\.yaml", README)):
        assert (root / name).exists(), name
    targets = set(re.findall(r"^([a-z-]+):", (root / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"(?:`|^|=online )make ([a-z-]+)", README, flags=re.MULTILINE)) <= targets
