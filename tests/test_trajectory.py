from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from webdataset import TarWriter, WebDataset
from xxhash import xxh3_64

from datamodules.windows import Order, WindowReader
from lit_shortcut.contracts import Conditions, Trajectories
from lit_shortcut.files import AccessError
from lit_shortcut.trajectory import (
    ENCODINGS,
    Card,
    Encoding,
    Source,
    TrajectoryError,
    problems,
    read_shard,
    write_shard,
)
from lit_shortcut.trajectory.card import shard_name
from lit_shortcut.trajectory.encoding import require_finite
from lit_shortcut.trajectory.index import finished_shards
from lit_shortcut.trajectory.interface_file import interface_fingerprint, load_interface, save_interface
from lit_shortcut.trajectory.transitions import concatenated, select
from tests.forged_shards import edit_index
from tests.tiny_trajectories import SPEC, adopt, card, interface, trajectories, transitions, write_set


def read_set(folder: Path, made: Card) -> Trajectories:
    return concatenated([one for index in range(made.num_shards) for one in read_shard(folder, index, made)])


@pytest.mark.parametrize("encoding", ["float32", "bfloat16", "float16"])
def test_reader_returns_what_writer_wrote(tmp_path: Path, encoding: str) -> None:
    made = write_set(tmp_path, encoding=encoding)
    expected = trajectories(list(range(11)))
    found = read_set(tmp_path, Card.read(tmp_path))
    assert Card.read(tmp_path) == made
    assert all(torch.equal(*pair) for pair in zip(found.conditions[:3], expected.conditions[:3], strict=True))
    assert torch.equal(found.features, expected.features.to(getattr(torch, encoding)))
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.committed_at, expected.committed_at)


def test_interface_comes_back_whole_even_with_tied_tensors(tmp_path: Path) -> None:
    made = interface()
    made.head_weight, made.head_bias = made.code_embedding, None
    save_interface(tmp_path, made)
    found = load_interface(tmp_path, card(interface=interface_fingerprint(made)))
    assert found.num_tokens == 9
    assert found.head_bias is None
    assert torch.equal(found.head_weight, made.code_embedding)
    assert torch.equal(found.position_embedding, made.position_embedding)


def test_shards_written_twice_are_bit_identical(tmp_path: Path) -> None:
    write_set(tmp_path / "a")
    write_set(tmp_path / "b")
    for path in sorted((tmp_path / "a").iterdir()):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_index_holds_where_every_array_lies_and_its_checksum(tmp_path: Path) -> None:
    made = write_set(tmp_path, encoding="int8")
    content = (tmp_path / "shard-000003.tar").read_bytes()
    index = json.loads((tmp_path / "shard-000003.json").read_text())
    assert (index["bytes"], index["card"]) == (len(content), made.digest)
    assert index["checksum"] == xxh3_64(content).hexdigest()
    assert list(index["samples"]) == ["00000009", "00000010"]
    members = index["samples"]["00000010"]
    for offset, size, checksum in members.values():
        assert xxh3_64(content[offset : offset + size]).hexdigest() == checksum
    steps = [f"{branch}{step:02d}.{part}" for branch in "cu" for step in range(4) for part in ("npy", "scales.npy")]
    assert list(members) == [*steps, "tokens.npy", "committed_at.npy", "json"]
    offset, size, _ = members["u02.npy"]
    values = torch.frombuffer(bytearray(content[offset : offset + size]), dtype=torch.int8).view(10, 6)
    assert torch.equal(values, ENCODINGS["int8"].encode(trajectories([10]).features[0, 1, 2])["npy"])


def decoded(sample: dict[str, Any], step: str, encoding: str) -> Tensor:
    """Features of a step as ``__init__.py`` tells to take them from plain WebDataset."""
    found = torch.from_numpy(sample[f"{step}.npy"])
    if encoding == "int8":
        return found * torch.from_numpy(sample[f"{step}.scales.npy"])[:, None]
    return found.view(torch.bfloat16) if encoding == "bfloat16" else found


@pytest.mark.parametrize("encoding", ["bfloat16", "int8"])
def test_shards_are_the_bytes_that_webdataset_would_write(tmp_path: Path, encoding: str) -> None:
    write_set(tmp_path, encoding=encoding)
    shard = tmp_path / "shard-000000.tar"
    with tarfile.open(shard) as tar, TarWriter(str(tmp_path / "own.tar"), "", "", 0o644, mtime=0, encoder=False) as own:
        for member in tar:
            key, _, ending = member.name.partition(".")
            content = tar.extractfile(member)
            assert content is not None
            own.write({"__key__": key, ending: content.read()})
    assert (tmp_path / "own.tar").read_bytes() == shard.read_bytes()


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # WebDataset leaves them to the collector
@pytest.mark.parametrize("encoding", ["int8", "bfloat16", "float16", "float32"])
def test_plain_webdataset_reads_a_whole_set(tmp_path: Path, encoding: str) -> None:
    made = write_set(tmp_path, encoding=encoding)
    urls = [str(path) for path in sorted(tmp_path.glob("shard-*.tar"))]
    samples = list(WebDataset(urls, shardshuffle=False).decode())
    assert [sample["json"]["id"] for sample in samples] == list(range(11))
    expected = read_set(tmp_path, made)
    for row, sample in enumerate(samples):
        assert sample["json"] == {"id": row, "seed": row + 100, "label": row % 10}
        assert sample["tokens.npy"].tolist() == expected.tokens[row].tolist()
        assert sample["committed_at.npy"].tolist() == expected.committed_at[row].tolist()
        for branch, letter in enumerate("cu"):
            for step in range(4):
                found = decoded(sample, f"{letter}{step:02d}", encoding)
                assert torch.equal(found, expected.features[row, branch, step])


def test_int8_is_off_by_half_a_scale_at_most_and_keeps_zeros_and_extremes() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 3, 50, 64, generator=generator) * torch.logspace(-30, 30, 50)[:, None]
    features[0, 0, 7] = 0
    encoded = ENCODINGS["int8"].encode(features)
    assert encoded["npy"].dtype == torch.int8
    found = ENCODINGS["int8"].decode(encoded)
    assert ((found - features).abs() <= encoded["scales.npy"][..., None] * 0.5001).all()
    assert (found[0, 0, 7] == 0).all()
    torch.testing.assert_close(found.abs().amax(-1), features.abs().amax(-1))


class Halves(Encoding):
    """The first half of the channels in 8-bit floating-point numbers, a scale for each block of three, no rest."""

    name = "halves"

    def members(self, num_rows: int, width: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        blocks = width // 2 // 3
        return {
            "fp8.npy": (torch.float8_e4m3fn, (num_rows, blocks, 3)),
            "scales.npy": (torch.float32, (num_rows, blocks, 1)),
        }

    def encode(self, features: Tensor) -> dict[str, Tensor]:
        blocks = features[..., : features.shape[-1] // 2].unflatten(-1, (-1, 3)).float()
        scales = blocks.abs().amax(-1, keepdim=True) / 256
        return {"fp8.npy": (blocks / scales).to(torch.float8_e4m3fn), "scales.npy": scales}

    def decode(self, parts: dict[str, Tensor]) -> Tensor:
        half = (parts["fp8.npy"].float() * parts["scales.npy"]).flatten(-2)
        return torch.cat([half, torch.zeros_like(half)], -1)

    def check(self, parts: dict[str, Tensor]) -> None:
        require_finite("scales", parts["scales.npy"])


def test_another_encoding_of_another_width_is_one_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENCODINGS, "halves", Halves())
    made = write_set(tmp_path, encoding="halves")
    assert list(problems(tmp_path)) == []
    expected, found = trajectories(list(range(11))).features, read_set(tmp_path, made).features
    assert found.shape == expected.shape
    torch.testing.assert_close(found[..., :3], expected[..., :3], rtol=0.07, atol=0)
    batch = WindowReader(Source(tmp_path, made), Order(3, 3, 2, 3, 3, seed=0), 1).read(0, range(5)).decode()
    assert batch.targets.shape == (5, 1, 10, 6)
    recorded = trajectories([0, 1, 2])
    recorded.features[2, -1, -1, -1, 0] = torch.nan
    with pytest.raises(TrajectoryError, match=r"sample 00000002: scales: expected finite float32"):
        write_shard(tmp_path / "other", 0, recorded, made)


def test_trajectory_branch_of_published_size_takes_12_megabytes_at_most() -> None:
    spec = SPEC._asdict() | {"num_tokens": 1024, "sequence_length": 1025, "width": 768}
    assert card(spec=spec, branches=1, num_steps=15, encoding="int8").sample_bytes <= 12e6


def test_members_have_no_time_and_no_owner(tmp_path: Path) -> None:
    write_set(tmp_path)
    with tarfile.open(tmp_path / "shard-000001.tar") as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.mode) for m in tar.getmembers()} == {(0, 0, 0, "", 0o644)}


def test_size_estimate_is_above_the_size_and_close_for_real_sizes(tmp_path: Path) -> None:
    made = write_set(tmp_path)
    size = sum(path.stat().st_size for path in tmp_path.glob("*.tar"))
    padding = 10240 * made.num_shards  # a tar is a whole number of 10 kB records
    assert size - padding <= made.sample_bytes * made.num_samples < 2 * size


def one_trajectory(features: Tensor, tokens: list[int], committed_at: list[int]) -> Trajectories:
    column = torch.zeros(1, dtype=torch.long)
    conditions = Conditions(column, column, column)
    return Trajectories(conditions, features[None], torch.tensor([tokens]), torch.tensor([committed_at]))


def test_transitions_of_a_trajectory_made_by_hand() -> None:
    features = torch.arange(2 * 3 * 3 * 1).view(2, 3, 3, 1).float()  # G=2, N=3, S=3, C=1
    found = transitions(one_trajectory(features, [4, 5, 6], [1, 0, 2]))
    assert found.step.tolist() == [0, 1, 0, 1]
    assert found.features.flatten(1).tolist() == [[0, 1, 2], [3, 4, 5], [9, 10, 11], [12, 13, 14]]
    assert found.targets.flatten(1).tolist() == [[3, 4, 5], [6, 7, 8], [12, 13, 14], [15, 16, 17]]
    assert found.control.tokens[:2].tolist() == [[[5]], [[4]]]
    assert found.control.positions[:2].tolist() == [[[1]], [[0]]]
    assert found.is_masked[:2].tolist() == [[[True, False, True]], [[False, False, True]]]
    assert found.masked_share[:2].tolist() == [[pytest.approx(2 / 3)], [pytest.approx(1 / 3)]]


def test_window_of_two_steps_has_a_control_and_a_target_for_each() -> None:
    item = transitions(one_trajectory(torch.arange(3.0).view(1, 3, 1, 1), [4, 5, 6, 7], [1, 0, 2, 1]), window=2)
    assert item.targets.flatten().tolist() == [1, 2]
    assert item.control.is_real is not None
    assert item.control.is_real.tolist() == [[[True, False], [True, True]]]
    assert item.control.tokens[item.control.is_real].tolist() == [5, 4, 7]
    assert item.control.positions[item.control.is_real].tolist() == [1, 0, 3]
    assert item.masked_share.tolist() == [[0.75, 0.25]]
    assert item.masked_share.dtype == torch.float32


def test_control_is_padded_to_the_longest() -> None:
    batch = transitions(trajectories([0]), window=2)
    assert batch.features.shape == (4, 10, 6)
    assert batch.targets.shape == (4, 2, 10, 6)
    assert batch.is_masked.shape == (4, 2, 9)
    assert batch.control.tokens.shape == (4, 2, 3)
    assert batch.control.is_real is not None
    assert batch.control.is_real.sum(2).tolist() == [[1, 2], [2, 3], [1, 2], [2, 3]]


@pytest.mark.parametrize("encoding", ["int8", "bfloat16", "float32"])
def test_batch_read_from_shards_is_the_batch_cut_from_trajectories(tmp_path: Path, encoding: str) -> None:
    made = write_set(tmp_path, encoding=encoding)
    order = Order(3, rows=3, branches=2, starts=2, group=2, seed=0)
    batch = WindowReader(Source(tmp_path, made), order, 2).read(5, range(10, 26))
    assert batch.features["npy"].dtype == getattr(torch, encoding)
    found, windows = batch.decode(), [order.at(5, position) for position in range(10, 26)]
    places = [(window.shard * 3 + window.row, window.branch, window.start) for window in windows]
    expected = select(read_set(tmp_path, made), places, 2)
    for mine, theirs in zip(
        (*found[:1], *found[1], *found[2:6]), (*expected[:1], *expected[1], *expected[2:6]), strict=True
    ):
        assert torch.equal(mine, theirs)


def test_batch_with_gaps_has_both_ends_and_all_tokens_between(tmp_path: Path) -> None:
    made = write_set(tmp_path)
    order = Order(3, rows=3, branches=2, starts=3, group=3, seed=0, max_gap=3)
    assert sorted(order.spans) == [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2), (2, 1)]
    assert len({order.at(0, position) for position in range(len(order))}) == len(order) == 3 * 3 * 2 * 6
    windows = [order.at(2, position) for position in range(20)]
    found = WindowReader(Source(tmp_path, made), order, 1).read(2, range(20)).decode()
    recorded = read_set(tmp_path, made)
    assert order.first_targets(2, range(20)) == [window.start + window.gap for window in windows]
    assert {window.gap for window in windows} == {1, 2, 3}
    for index, window in enumerate(windows):
        row, end = window.shard * 3 + window.row, window.start + window.gap
        assert torch.equal(found.features[index], recorded.features[row, window.branch, window.start])
        assert torch.equal(found.targets[index, 0], recorded.features[row, window.branch, end])
        committed_at = recorded.committed_at[row]
        assert torch.equal(found.is_masked[index, 0], committed_at >= end)
        is_real = ... if found.control.is_real is None else found.control.is_real[index, 0]
        positions = found.control.positions[index, 0][is_real]
        assert positions.tolist() == ((committed_at >= window.start) & (committed_at < end)).nonzero()[:, 0].tolist()
        assert torch.equal(found.control.tokens[index, 0][is_real], recorded.tokens[row][positions].long())
        assert (int(found.step[index]), int(found.gap[index])) == (window.start, window.gap)


def test_order_visits_every_window_once_and_mixes_a_group() -> None:
    order = Order(5, rows=3, branches=2, starts=4, group=2, seed=1)
    seen = [order.at(0, position) for position in range(len(order))]
    assert len(order) == len(set(seen)) == 5 * 3 * 2 * 4
    assert [len({window.shard for window in seen[start : start + 48]}) for start in (0, 48, 96)] == [2, 2, 1]
    assert len({window.shard for window in seen[:12]}) == 2
    assert [order.group_at(position) for position in (0, 47, 48, 119)] == [0, 0, 1, 2]
    assert seen != [order.at(1, position) for position in range(len(order))]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format_version: expected 3, found 2; record the set again"),
        ({"seed": None}, "changed since it was written"),
        ({"seed": 8}, "changed since it was written"),
        ({"digest": None}, "changed since it was written"),
    ],
)
def test_changed_card_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    card().write(tmp_path)
    path = tmp_path / "card.json"
    values = {key: value for key, value in (json.loads(path.read_text()) | change).items() if value is not None}
    path.write_text(json.dumps(values))
    with pytest.raises(TrajectoryError, match=f"card.json: {message}"):
        Card.read(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoding": "float8"}, "encoding: expected one of int8, bfloat16, float16, float32"),
        ({"base": {"class": "Tiny"}}, "base: expected an identity with a fingerprint"),
        ({"spec": {"width": 6}}, "spec: expected integers num_tokens"),
        ({"branches": 0}, "branches: expected at least 1"),
        ({"num_samples": 10**15}, "num_samples: expected at most 10000000 shards"),
    ],
)
def test_card_that_makes_no_sense_is_named_with_its_key(change: dict[str, object], message: str) -> None:
    with pytest.raises(TrajectoryError, match=message):
        card(**change)


def test_encoding_that_is_not_registered_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(ENCODINGS, "halves", Halves())
        card(encoding="halves").write(tmp_path)
    with pytest.raises(TrajectoryError, match=r"card\.json: encoding: expected one of .*, found 'halves'"):
        Card.read(tmp_path)


def test_missing_card_and_card_without_json_are_named(tmp_path: Path) -> None:
    with pytest.raises(TrajectoryError, match=r"card\.json: expected the card"):
        Card.read(tmp_path / "nowhere")
    (tmp_path / "card.json").write_text("{")
    with pytest.raises(TrajectoryError, match=r"card\.json: expected the card"):
        Card.read(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": float("nan")}, "sample 00000004: features: expected finite"),
        ({"features": 1e6}, "sample 00000004: features: expected finite float16"),
        ({"tokens": 5}, r"sample 00000004: tokens: expected values in 0..4, found \d..5"),
        ({"committed_at": 4}, r"sample 00000004: committed_at: expected values in 0..3"),
    ],
)
def test_values_that_cannot_be_are_not_written(tmp_path: Path, change: dict[str, float], message: str) -> None:
    recorded = trajectories([3, 4, 5])
    for name, value in change.items():
        getattr(recorded, name)[1].view(-1)[0] = value
    with pytest.raises(TrajectoryError, match=message):
        write_shard(tmp_path, 1, recorded, card(encoding="float16"))
    assert list(tmp_path.iterdir()) == []


def test_samples_of_another_shard_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(TrajectoryError, match=r"expected samples range\(0, 3\)"):
        write_shard(tmp_path, 0, trajectories([3, 4, 5]), card())


def test_full_disk_leaves_no_shard_and_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shard(tmp_path, 0, trajectories([0, 1, 2]), card())

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(AccessError, match=r"000001\.json: cannot be written \(No space left"):
        write_shard(tmp_path, 1, trajectories([3, 4, 5]), card())
    assert {path.name for path in tmp_path.iterdir()} == {"shard-000000.tar", "shard-000000.json"}


def test_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(AccessError, match=r"file/card\.json: cannot be written"):
        card().write(tmp_path / "file")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_rows": True}, "expected text_rows: True, prompts: False"),
        ({"prompts": "0" * 64}, "expected text_rows: False, prompts: True"),
        ({"num_steps": 3}, "features: expected 3 steps of 6"),
        ({"spec": SPEC._asdict() | {"sequence_length": 11}}, "features: expected 11 rows in each of 2 branches"),
        ({"branches": 1}, "features: expected 10 rows in each of 1 branches"),
    ],
)
def test_samples_that_do_not_fit_the_card_are_not_written(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(TrajectoryError, match=f"sample 00000000: {message}"):
        write_shard(tmp_path, 0, trajectories([0, 1, 2]), card(**change))
    assert list(tmp_path.iterdir()) == []


def test_shard_is_finished_only_with_the_size_its_index_says(tmp_path: Path) -> None:
    made = write_set(tmp_path)
    sizes = finished_shards(tmp_path, made)
    assert sizes == {index: (tmp_path / shard_name(index)).stat().st_size for index in range(4)}
    (tmp_path / shard_name(0)).unlink()
    (tmp_path / shard_name(1)).write_bytes(b"")
    (tmp_path / "shard-000002.json").unlink()
    assert finished_shards(tmp_path, made) == {3: sizes[3]}


@pytest.mark.parametrize("kept", [0, 512, 700, 4096, 12000])
def test_shard_cut_short_is_never_taken_for_a_whole_one(tmp_path: Path, kept: int) -> None:
    made = write_set(tmp_path)
    path = tmp_path / shard_name(0)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(TrajectoryError, match=rf"shard-000000\.tar: expected \d+ bytes .* found {kept}"):
        list(read_shard(tmp_path, 0, made))
    edit_index(tmp_path, 0, bytes=kept)
    with pytest.raises(TrajectoryError, match=r"shard-000000\.tar: sample 0000000"):
        list(read_shard(tmp_path, 0, made))


def test_shard_cut_while_it_is_open_is_named(tmp_path: Path) -> None:
    made = write_set(tmp_path)
    source = Source(tmp_path, made)
    source.read(0, lambda shard: shard.head(0))
    os.truncate(tmp_path / shard_name(0), 700)
    with pytest.raises(TrajectoryError, match=r"shard-000000\.tar: sample \d{8}: .* ends at byte"):
        source.read(0, lambda shard: shard.trajectory(0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoding": "bfloat16"}, "features: expected 10 rows in each of 2 branches, found .20, 20."),
        ({"encoding": "int8"}, "features: expected 10 rows"),
        ({"spec": SPEC._asdict() | {"num_tokens": 8}}, "tokens.npy: expected 32 bytes .* found 36"),
        ({"spec": SPEC._asdict() | {"codebook_size": 4}}, "tokens: expected values in 0..3"),
        ({"num_steps": 5}, "'c04.npy' is missing|committed_at"),
        ({"text_rows": True}, "'prefix.lengths.npy' is missing"),
        ({"prompts": "0" * 64}, "json: expected id, seed, label, prompt of this sample"),
    ],
)
def test_sample_that_does_not_fit_its_card_is_named(tmp_path: Path, change: dict[str, object], message: str) -> None:
    write_set(tmp_path)
    other = adopt(tmp_path, card(**change))
    with pytest.raises(TrajectoryError, match=rf"shard-000000\.tar: sample 0000000.: {message}"):
        list(read_shard(tmp_path, 0, other))


def test_shard_of_another_set_is_refused(tmp_path: Path) -> None:
    made = write_set(tmp_path)
    with pytest.raises(TrajectoryError, match=rf"shard-000000\.json: expected a shard of set \w+, .* {made.digest}"):
        list(read_shard(tmp_path, 0, card(base={"fingerprint": "feedfeedfeedfeed"})))
