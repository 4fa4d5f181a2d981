from __future__ import annotations

import hashlib
import json
import os
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load
from torch import Tensor
from webdataset.tariterators import group_by_keys, tar_file_expander
from xxhash import xxh3_64

from lit_shortcut.contracts import Conditions, Trajectories
from lit_shortcut.trajectory import (
    Card,
    Order,
    Source,
    Trajectory,
    TrajectoryError,
    WindowReader,
    encode,
    finished_shards,
    interface_fingerprint,
    is_complete,
    load_interface,
    read_shard,
    save_interface,
    select,
    shard_name,
    stack,
    transitions,
    write_shard,
)
from tests.forged_shards import edit_sidecar
from tests.tiny_trajectories import SPEC, adopt, card, interface, trajectories, write_set


def read_set(folder: Path, made: Card) -> list[Trajectory]:
    return [one for index in range(made.num_shards) for one in read_shard(folder, index, made)]


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


def test_sidecar_tells_size_digest_and_a_checksum_of_every_step(tmp_path: Path) -> None:
    made = write_set(tmp_path, dtype="int8")
    content = (tmp_path / "shard-000003.tar").read_bytes()
    found = json.loads((tmp_path / "shard-000003.json").read_text())
    assert found["bytes"] == len(content)
    assert found["sha256"] == hashlib.sha256(content).hexdigest()
    assert found["card"] == made.digest
    with tarfile.open(tmp_path / "shard-000003.tar") as tar:
        tensors = load(tar.extractfile("00000010.safetensors").read())  # type: ignore[union-attr]
        facts = tar.extractfile("00000010.json").read()  # type: ignore[union-attr]
    expected = [
        xxh3_64(tensors["features"][g, n].numpy().tobytes() + tensors["scales"][g, n].numpy().tobytes()).hexdigest()
        for g in range(2)
        for n in range(4)
    ]
    (_, (facts_sum, _, steps)) = found["checksums"]
    assert steps == expected
    assert facts_sum == xxh3_64(facts).hexdigest()


def test_plain_webdataset_reads_the_shards(tmp_path: Path) -> None:
    write_set(tmp_path, dtype="int8")
    path = tmp_path / "shard-000001.tar"
    with path.open("rb") as stream:
        samples = list(group_by_keys(tar_file_expander([{"url": str(path), "stream": stream}])))
    assert [sample["__key__"] for sample in samples] == ["00000003", "00000004", "00000005"]
    tensors = load(samples[1]["safetensors"])
    decoded = tensors["features"] * tensors["scales"][..., None]
    assert (decoded - trajectories([4]).features[0]).abs().max() < 4 / 254
    assert json.loads(samples[1]["json"]) == {"id": 4, "seed": 104, "label": 4}


def test_int8_is_off_by_half_a_scale_at_most_and_keeps_zeros_and_extremes() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 3, 50, 64, generator=generator) * torch.logspace(-30, 30, 50)[:, None]
    features[0, 0, 7] = 0
    encoded = encode(features, "int8")
    assert encoded.values.dtype == torch.int8
    assert encoded.scales is not None
    error = (encoded.decode() - features).abs()
    assert (error <= encoded.scales[..., None] * 0.5001).all()
    assert (encoded.decode()[0, 0, 7] == 0).all()
    largest = features.abs().amax(-1)
    torch.testing.assert_close(encoded.decode().abs().amax(-1), largest)


def test_trajectory_branch_of_published_size_takes_12_megabytes_at_most() -> None:
    spec = SPEC._asdict() | {"num_tokens": 1024, "sequence_length": 1025, "width": 768}
    assert card(spec=spec, branches=1, num_steps=15, dtype="int8").sample_bytes <= 12e6


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


def test_control_is_padded_to_the_longest() -> None:
    batch = transitions(trajectories([0]), window=2)
    assert batch.features.shape == (4, 10, 6)
    assert batch.targets.shape == (4, 2, 10, 6)
    assert batch.is_masked.shape == (4, 2, 9)
    assert batch.control.tokens.shape == (4, 2, 3)
    assert batch.control.is_real is not None
    assert batch.control.is_real.sum(2).tolist() == [[1, 2], [2, 3], [1, 2], [2, 3]]


@pytest.mark.parametrize("dtype", ["int8", "bfloat16", "float32"])
def test_batch_read_from_shards_is_the_batch_cut_from_trajectories(tmp_path: Path, dtype: str) -> None:
    made = write_set(tmp_path, dtype=dtype)
    order = Order(3, rows=3, branches=2, starts=2, group=2, seed=0)
    batch = WindowReader(Source(tmp_path, made), order, 2).read(5, range(10, 26))
    assert batch.features.values.dtype == getattr(torch, dtype)
    found, windows = batch.decode(), [order.at(5, position) for position in range(10, 26)]
    places = [(window.shard * 3 + window.row, window.branch, window.start) for window in windows]
    expected = select(stack(read_set(tmp_path, made)), places, 2)
    for mine, theirs in zip(
        (*found[:1], *found[1], *found[2:6]), (*expected[:1], *expected[1], *expected[2:6]), strict=True
    ):
        assert torch.equal(mine, theirs)


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
        ({"format_version": 1}, "format_version: expected 2, found 1; record the set anew"),
        ({"seed": None}, "seed: missing"),
        ({"num_samples": "many"}, "num_samples: expected int, found 'many'"),
        ({"dtype": "float8"}, "dtype: expected one of int8, bfloat16, float16, float32"),
        ({"spec": {"width": 6}}, "spec: expected integers num_tokens"),
        ({"branches": 0}, "branches: expected at least 1"),
        ({"seed": 8}, "changed since it was written: expected digest"),
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
    with pytest.raises(TrajectoryError, match=r"shard-000000\.tar: its size differs from shard-000000\.json"):
        list(read_shard(tmp_path, 0, made))
    edit_sidecar(tmp_path, 0, bytes=kept)
    with pytest.raises(TrajectoryError, match=r"shard-000000\.tar"):
        list(read_shard(tmp_path, 0, made))


def test_shard_cut_while_it_is_open_is_named(tmp_path: Path) -> None:
    made = write_set(tmp_path)
    shard = Source(tmp_path, made).shard(0)
    path = tmp_path / shard_name(0)
    os.truncate(path, 700)
    with pytest.raises(TrajectoryError, match=r"shard-000000\.tar: .* the shard is cut short"):
        shard.trajectory(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "bfloat16"}, r"features: expected torch.bfloat16 .* found torch.float32"),
        ({"dtype": "int8"}, "'scales' is missing"),
        ({"spec": SPEC._asdict() | {"width": 7}}, r"features: expected .*10, 7\), found .*10, 6\)"),
        ({"spec": SPEC._asdict() | {"codebook_size": 4}}, "tokens: expected values in 0..3"),
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
        list(read_shard(tmp_path, 0, card(base_fingerprint="feedfeedfeedfeed")))
