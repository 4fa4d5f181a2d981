"""What README shows works as it is shown."""

from __future__ import annotations

import re
from pathlib import Path

import torch

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_python_example_draws_ten_garments() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    names: dict[str, object] = {}
    exec(example, names)
    images = names["images"]
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
