"""The benches of recording, reading and encoding at small sizes: what they print is what they measured."""

from __future__ import annotations

import pytest

from benchmarks import loader, price, recording
from lit_shortcut.contracts import TokenSpec


def test_recording_is_compared_with_sampling_of_the_same_images(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"NUM_IMAGES": 4, "BATCH_SIZE": 2, "ROUNDS": 1}.items():
        monkeypatch.setattr(recording, name, value)
    plain, *recorded = recording.measure().rows
    assert plain["processor time over sampling, %"] == plain["clock over sampling, %"] == 0
    assert [row["what"] for row in recorded] == ["recording bfloat16", "recording int8"]
    assert all(row["processor ms an image"] > 0 for row in (plain, *recorded))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the reference way leaves its tar open
def test_shards_are_read_beside_the_reference_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "SPEC", TokenSpec(16, 17, 256, 8, 8, 10))
    for name, value in {"NUM_STEPS": 9, "BUFFER": 20, "PAIRS": 8, "ROUNDS": 1}.items():
        monkeypatch.setattr(loader, name, value)
    rows = loader.measure().rows
    assert [row["way"] for row in rows if row["times the reference"] == 1] == list(loader.REFERENCES)
    sizes = {row["way"]: row["MB a trajectory branch"] for row in rows}
    assert sizes["int8"] < sizes["bfloat16"] < sizes["reference, in the process"]
    assert [row["way"] for row in rows].count("int8, 2 threads") == len(loader.REFERENCES)
    assert all(row["pairs/s"] > 0 for row in rows)


def test_price_is_that_of_what_each_encoding_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"NUM_IMAGES": 12, "SHARD": 4, "VALIDATION_SHARDS": 1, "STEPS": 2}.items():
        monkeypatch.setattr(price, name, value)
    exact, half, quantised = price.measure().rows
    assert exact["over float32, %"] == 0
    assert exact["MB a trajectory branch"] > half["MB a trajectory branch"] > quantised["MB a trajectory branch"]
    assert half["val/mse"] == pytest.approx(exact["val/mse"], rel=0.01)
    assert quantised["val/mse"] == pytest.approx(exact["val/mse"], rel=0.01)
    assert quantised["over float32, %"] != 0
