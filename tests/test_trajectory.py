from __future__ import annotations

import hashlib
import json
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

from lit_shortcut.trajectory import (
    Card,
    Trajectory,
    TrajectoryError,
    collate,
    finished_shards,
    is_complete,
    load_interface,
    read_shard,
    read_trajectory,
    save_interface,
    shard_name,
    stack,
    transitions,
    write_shard,
)
from tests.tiny_trajectories import card, interface, trajectories, write_set


def read_set(folder: Path, made: Card) -> list[Trajectory]:
    samples = (sample for index in range(made.num_shards) for sample in read_shard(folder, index, made))
    return [read_trajectory(sample, made) for sample in samples]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_reader_returns_what_writer_wrote(tmp_path: Path, dtype: str) -> None:
    made = write_set(tmp_path, dtype=dtype)
    expected = trajectories(list(range(11)))
    found = stack(read_set(tmp_path, Card.read(tmp_path)))
    assert Card.read(tmp_path) == made
    assert all(torch.equal(*pair) for pair in zip(found.conditions[:3], expected.conditions[:3], strict=True))
    assert torch.equal(found.features, expected.features.to(getattr(torch, dtype)))
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.committed_at, expected.committed_at)


def test_interface_comes_back_whole_even_with_tied_tensors(tmp_path: Path) -> None:
    made = interface()
    made.head_weight, made.head_bias = made.code_embedding, None
    save_interface(tmp_path, made)
    found = load_interface(tmp_path)
    assert found.num_tokens == 9
    assert found.head_bias is None
    assert torch.equal(found.head_weight, made.code_embedding)
    assert torch.equal(found.position_embedding, made.position_embedding)


def test_shards_written_twice_are_bit_identical(tmp_path: Path) -> None:
    write_set(tmp_path / "a")
    write_set(tmp_path / "b")
    for path in sorted((tmp_path / "a").iterdir()):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_sidecar_tells_samples_size_and_digest(tmp_path: Path) -> None:
    write_set(tmp_path)
    content = (tmp_path / "shard-000003.tar").read_bytes()
    expected = {"samples": 2, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert json.loads((tmp_path / "shard-000003.json").read_text()) == expected


def test_members_are_plain_and_nobodys(tmp_path: Path) -> None:
    write_set(tmp_path)
    with tarfile.open(tmp_path / "shard-000001.tar") as tar:
        members = tar.getmembers()
    assert [m.name for m in members] == [f"{i:08d}.{end}" for i in (3, 4, 5) for end in ("safetensors", "json")]
    assert {(m.mtime, m.uid, m.gid, m.uname, m.mode) for m in members} == {(0, 0, 0, "", 0o644)}


def test_size_estimate_is_above_the_size_and_close_for_real_sizes(tmp_path: Path) -> None:
    made = write_set(tmp_path)
    size = sum(path.stat().st_size for path in tmp_path.glob("*.tar"))
    padding = 10240 * made.num_shards  # a tar is a whole number of 10 kB records
    assert size - padding <= made.sample_bytes * made.num_samples < 2 * size


def test_transitions_of_a_trajectory_made_by_hand() -> None:
    features = torch.arange(2 * 3 * 3 * 1).view(2, 3, 3, 1).float()  # G=2, N=3, S=3, C=1
    one = Trajectory(0, 0, 0, features, torch.tensor([4, 5, 6]).int(), torch.tensor([1, 0, 2]).short())
    items = list(transitions(one))
    assert len(items) == 4
    first, second, third = items[:3]
    assert first.features.flatten().tolist() == [0, 1, 2]
    assert first.targets.flatten().tolist() == [3, 4, 5]
    assert (first.control.tokens.tolist(), first.control.positions.tolist()) == ([[[5]]], [[[1]]])
    assert first.is_masked.tolist() == [[[True, False, True]]]
    assert first.masked_share.tolist() == [[pytest.approx(2 / 3)]]
    assert second.control.tokens.tolist() == [[[4]]]
    assert second.is_masked.tolist() == [[[False, False, True]]]
    assert [item.step.item() for item in items] == [0, 1, 0, 1]
    assert third.features.flatten().tolist() == [9, 10, 11]  # the second branch


def test_window_of_two_steps_has_a_control_and_a_target_for_each() -> None:
    features = torch.arange(3.0).view(1, 3, 1, 1)
    one = Trajectory(0, 0, 0, features, torch.tensor([4, 5, 6, 7]).int(), torch.tensor([1, 0, 2, 1]).short())
    (item,) = transitions(one, window=2)
    assert item.targets.flatten().tolist() == [1, 2]
    assert item.control.is_real is not None
    assert item.control.is_real.tolist() == [[[True, False], [True, True]]]
    assert item.control.tokens[item.control.is_real].tolist() == [5, 4, 7]
    assert item.control.positions[item.control.is_real].tolist() == [1, 0, 3]
    assert item.masked_share.tolist() == [[0.75, 0.25]]


def test_collate_pads_control_to_the_longest() -> None:
    made, recorded = card(), trajectories([0])
    one = Trajectory(0, 0, 0, recorded.features[0], recorded.tokens[0], recorded.committed_at[0])
    batch = collate(list(transitions(one, window=2)))
    assert batch.features.shape == (4, 10, 6)
    assert batch.targets.shape == (4, 2, 10, 6)
    assert batch.is_masked.shape == (4, 2, 9)
    assert batch.control.tokens.shape == (4, 2, 3)
    assert batch.control.is_real is not None
    assert batch.control.is_real.sum(2).tolist() == [[1, 2], [2, 3], [1, 2], [2, 3]]
    assert made.branches * (made.num_steps - 2) == len(batch.step)


def test_transition_does_not_keep_its_trajectory_alive() -> None:
    recorded = trajectories([0])
    one = Trajectory(0, 0, 0, recorded.features[0], recorded.tokens[0], recorded.committed_at[0])
    item = next(transitions(one))
    assert item.features.untyped_storage().nbytes() == item.features.nbytes
    assert item.targets.untyped_storage().nbytes() == item.targets.nbytes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format_version: expected 1, found 2"),
        ({"seed": None}, "seed: missing"),
        ({"num_samples": "many"}, "num_samples: expected int, found 'many'"),
        ({"dtype": "float8"}, "dtype: expected one of bfloat16, float16, float32"),
        ({"spec": {"width": 6}}, "spec: expected integers num_tokens"),
        ({"branches": 0}, "branches: expected at least 1"),
    ],
)
def test_damaged_card_is_named_with_its_key(tmp_path: Path, change: dict[str, object], message: str) -> None:
    card().write(tmp_path)
    path = tmp_path / "card.json"
    values = {key: value for key, value in (json.loads(path.read_text()) | change).items() if value is not None}
    path.write_text(json.dumps(values))
    with pytest.raises(TrajectoryError, match=f"card.json: {message}"):
        Card.read(tmp_path)


def test_missing_card_and_card_without_json_are_named(tmp_path: Path) -> None:
    with pytest.raises(TrajectoryError, match=r"card\.json: expected the card"):
        Card.read(tmp_path / "nowhere")
    (tmp_path / "card.json").write_text("{")
    with pytest.raises(TrajectoryError, match=r"card\.json: expected JSON"):
        Card.read(tmp_path)


@pytest.mark.parametrize("source", ["pipe:cat x", "https://a/b::c"])
def test_sources_that_run_commands_are_refused(source: str) -> None:
    with pytest.raises(TrajectoryError, match="refused"):
        Card.read(source)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": float("nan")}, "sample 4: features: expected finite"),
        ({"features": 1e6}, "sample 4: features: expected finite float16"),
        ({"tokens": 5}, r"sample 4: tokens: expected values in 0..4, found \d..5"),
        ({"committed_at": 4}, r"sample 4: committed_at: expected values in 0..3"),
    ],
)
def test_values_that_cannot_be_are_not_written(tmp_path: Path, change: dict[str, float], message: str) -> None:
    recorded = trajectories([3, 4, 5])
    for name, value in change.items():
        getattr(recorded, name)[1].view(-1)[0] = value
    with pytest.raises(TrajectoryError, match=message):
        write_shard(tmp_path, 1, recorded, card(dtype="float16"))
    assert list(tmp_path.iterdir()) == []


def test_samples_of_another_shard_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(TrajectoryError, match=r"expected samples range\(0, 3\)"):
        write_shard(tmp_path, 0, trajectories([3, 4, 5]), card())


def test_full_disk_leaves_no_shard_and_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shard(tmp_path, 0, trajectories([0, 1, 2]), card())

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(TrajectoryError, match=r"000001\.json.*No space left.*running the same command again goes on"):
        write_shard(tmp_path, 1, trajectories([3, 4, 5]), card())
    assert {path.name for path in tmp_path.iterdir()} == {"shard-000000.tar", "shard-000000.json"}


def test_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(TrajectoryError, match=r"file/card\.json: cannot be written"):
        card().write(tmp_path / "file")


def test_shard_is_finished_with_its_sidecars_size_alone(tmp_path: Path) -> None:
    made = write_set(tmp_path)
    assert is_complete(tmp_path, made)
    (tmp_path / shard_name(0)).unlink()
    (tmp_path / shard_name(1)).write_bytes(b"")
    (tmp_path / "shard-000002.json").unlink()
    assert finished_shards(tmp_path, made) == {3}


@pytest.mark.parametrize("kept", [0, 512, 700, 4096, 12000])
def test_shard_cut_short_is_never_taken_for_a_whole_one(tmp_path: Path, kept: int) -> None:
    made = write_set(tmp_path)
    path = tmp_path / shard_name(0)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(TrajectoryError, match=r"shard-000000\.tar"):
        [read_trajectory(sample, made) for sample in read_shard(tmp_path, 0, made)]


def test_shard_cut_between_two_samples_is_noticed(tmp_path: Path) -> None:
    made = write_set(tmp_path)
    path = tmp_path / shard_name(0)
    with tarfile.open(path) as tar:
        cut = tar.getmembers()[4].offset  # of six: both of the third sample are lost, and the end mark
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(TrajectoryError, match="expected 3 samples, found 2; the shard is cut short"):
        list(read_shard(tmp_path, 0, made))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "bfloat16"}, r"features: expected torch.bfloat16 .* found torch.float32"),
        ({"spec": card().spec | {"width": 7}}, r"features: expected .*10, 7\), found .*10, 6\)"),
        ({"spec": card().spec | {"codebook_size": 4}}, "tokens: expected values in 0..3"),
        ({"num_steps": 5}, r"features: expected .*\(2, 5, 10, 6\)"),
    ],
)
def test_sample_that_does_not_fit_its_card_is_named(tmp_path: Path, change: dict[str, object], message: str) -> None:
    write_set(tmp_path)
    other = card(**change)
    with pytest.raises(TrajectoryError, match=rf"shard-000000\.tar: sample 0000000.: {message}"):
        [read_trajectory(sample, other) for sample in read_shard(tmp_path, 0, other)]


def test_sample_with_nan_or_without_a_member_is_named(tmp_path: Path) -> None:
    made = write_set(tmp_path)
    (sample, *_) = read_shard(tmp_path, 0, made)
    whole = sample["safetensors"]
    tensors = load(whole)
    tensors["features"][0, 0, 0, 0] = float("nan")
    damaged = save(tensors)
    with pytest.raises(TrajectoryError, match="sample 00000000: features: expected finite"):
        read_trajectory(sample | {"safetensors": damaged}, made)
    with pytest.raises(TrajectoryError, match="sample 00000000: 'json' is missing"):
        read_trajectory({key: value for key, value in sample.items() if key != "json"}, made)
    with pytest.raises(TrajectoryError, match="sample 00000000: not readable"):
        read_trajectory(sample | {"safetensors": whole[:40]}, made)
