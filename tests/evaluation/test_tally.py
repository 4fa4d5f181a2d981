from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_shortcut.contracts import Conditions
from lit_shortcut.evaluation.drawing import Drawn
from lit_shortcut.evaluation.tally import FullSteps, Tally
from lit_shortcut.metrics.images import ImageMetric
from tests.metrics.asked import asked
from tests.metrics.brightness import Brightness

KEY = {"seed": 0, "base": {"template": "{}"}}
CPU = torch.device("cpu")


class Median(ImageMetric):
    """A metric whose state is a list: it needs all images at once."""

    higher_is_better = True
    means: list[Tensor]

    def __init__(self, power: int = 1) -> None:
        super().__init__()
        self.power = power
        self.add_state("means", [], dist_reduce_fx="cat")

    def update(self, images: Tensor, conditions: Conditions) -> None:
        self.means.append(images.float().flatten(1).mean(1))

    def compute(self) -> Tensor:
        return torch.cat(self.means).median() ** self.power

    def gathers(self) -> object:
        return "means"


def tally(path: Path | None, **changes: Any) -> Tally:
    return Tally({"median": Median(), "brightness": Brightness(), "squared": Median(2)}, 6, CPU, path, KEY | changes)


def batch(index: int) -> tuple[Drawn, Conditions]:
    generator = torch.Generator().manual_seed(index)
    images = torch.randint(256, (3, 3, 4, 4), dtype=torch.uint8, generator=generator)
    return Drawn(images, torch.tensor([1, 2, 1 + index]), torch.zeros(3, 1)), asked(torch.zeros(3))


def test_resumed_after_any_batch_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole = tally(None)
    for index in range(4):
        whole.add(*batch(index))
    for stop in range(4):
        path = tmp_path / f"{stop}.safetensors"
        killed = tally(path)
        for index in range(stop):
            killed.add(*batch(index))
        resumed = tally(path)
        assert resumed.batches == stop
        for index in range(stop, 4):
            resumed.add(*batch(index))
        assert resumed.compute() == whole.compute()
        resumed.drop()
    assert list(tmp_path.iterdir()) == []


def test_kill_between_the_files_of_a_batch_loses_that_batch_only(tmp_path: Path) -> None:
    path = tmp_path / "row.safetensors"
    killed = tally(path)
    killed.add(*batch(0))
    before = path.read_bytes()
    killed.add(*batch(1))
    path.write_bytes(before)  # as if only the list's elements had been written
    resumed = tally(path)
    assert resumed.batches == 1
    resumed.add(*batch(1))
    assert resumed.compute() == killed.compute()


@pytest.mark.parametrize("damage", ["key", "file", "lists"])
def test_states_of_another_row_or_damaged_ones_are_ignored_and_the_log_says_so(
    tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("lit_shortcut.evaluation.tally.rank_zero_info", said.append)
    path = tmp_path / "row.safetensors"
    tally(path).add(*batch(0))
    if damage == "file":
        path.write_bytes(path.read_bytes()[:-9])
    if damage == "lists":
        (other,) = tmp_path.glob("row.batch*")
        other.write_bytes(b"")
    found = tally(path, base={"template": "a {}"}) if damage == "key" else tally(path)
    assert found.batches == 0
    found.add(*batch(1))
    alone = tally(None)
    alone.add(*batch(1))
    assert found.compute() == alone.compute()
    (line,) = said
    assert str(path) in line
    assert damage != "key" or "base.template was '{}' and is 'a {}'" in line


def test_rows_share_no_state() -> None:
    metrics = {"brightness": Brightness()}
    one, two = (Tally(metrics, 6, CPU) for _ in range(2))
    one.add(*batch(0))
    two.add(*batch(1))
    assert two.compute()[0]["brightness"] == pytest.approx(float(batch(1)[0].images.float().mean()))


def test_passes_are_summed_up_by_mean_and_range() -> None:
    metric = FullSteps(8)
    metric.update(torch.tensor([3] * 10 + [4] * 80))
    metric.update(torch.tensor([7] * 10))
    assert metric.compute() == {"mean": pytest.approx(4.2), "low": 3, "high": 7}
    metric.reset()
    metric.update(torch.tensor([4] * 99 + [8]))
    assert metric.compute() == {"mean": pytest.approx(4.04), "low": 4, "high": 4}
