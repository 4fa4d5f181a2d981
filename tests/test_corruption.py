"""Damaged and forged sets: refused by name, skipped where asked for, found by ``verify``; nothing of them is run."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from datamodules.trajectories import TrajectoryDataModule
from lit_shortcut.cli import main
from lit_shortcut.files import AccessError
from lit_shortcut.interface import TokenInterface
from lit_shortcut.trajectory import Card, TrajectoryError, problems, read_shard
from lit_shortcut.trajectory.card import shard_name
from lit_shortcut.trajectory.interface_file import load_interface, save_interface
from lit_shortcut.weights import WeightsError
from tests.datamodules.opened import make
from tests.forged_shards import Members, edit_index, forge, replaced
from tests.tiny_trajectories import interface, trajectories, write_set


def everything(folder: Path) -> list[Tensor]:
    """All tensors that a set gives."""
    made = Card.read(folder)
    found = list(load_interface(folder, made).state_dict().values())
    for index in range(made.num_shards):
        for one in read_shard(folder, index, made):
            found += [*one.conditions[:3], *one[1:4]]
    return found


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    write_set(folder, num_samples=3, samples_per_shard=2)
    return folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "set"))


def damages(content: bytes, rng: random.Random) -> list[bytes]:
    """Bytes flipped anywhere and in the headers, and cuts."""
    found = []
    for end in [len(content)] * 15 + [min(len(content), 700)] * 10:
        place, mask = rng.randrange(end), rng.randrange(1, 256)
        found.append(content[:place] + bytes([content[place] ^ mask]) + content[place + 1 :])
    return found + [content[: rng.randrange(len(content))] for _ in range(5)]


@pytest.mark.parametrize(
    "name", ["card.json", "interface.safetensors", "shard-000000.tar", "shard-000000.json", "shard-000001.tar"]
)
def test_damaged_byte_is_refused_or_changes_nothing_that_is_read(sound: Path, folder: Path, name: str) -> None:
    expected, path, refused = everything(sound), folder / name, []
    for content in damages(path.read_bytes(), random.Random(name)):
        path.write_bytes(content)
        told = list(problems(folder))
        try:
            found = everything(folder)
        except (TrajectoryError, WeightsError) as error:
            refused.append((str(error), told))
        else:  # headers and padding of the tar, a blank of JSON, the checksum that only verify compares
            assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
            assert told or name == "card.json"
    assert len(refused) > 5
    for message, told in refused:
        assert name.partition(".")[0] in message
        assert told


def test_any_byte_of_any_member_is_guarded(folder: Path) -> None:
    made, path = Card.read(folder), folder / shard_name(0)
    content = path.read_bytes()
    samples = json.loads(path.with_suffix(".json").read_text())["samples"]
    for key, members in samples.items():
        for ending, (offset, size, _) in members.items():
            place = offset + random.Random(ending).randrange(size)
            path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            with pytest.raises(TrajectoryError, match=rf"shard-000000\.tar: sample {key}: {ending}: checksum differs"):
                list(read_shard(folder, 0, made))


@pytest.mark.parametrize(("one", "other"), [("c00.npy", "c01.npy"), ("c02.npy", "u02.npy")])
def test_swapped_members_are_noticed(folder: Path, one: str, other: str) -> None:
    path = folder / shard_name(0)
    samples, content = json.loads(path.with_suffix(".json").read_text())["samples"], bytearray(path.read_bytes())
    (first, size, _), (second, _, _) = samples["00000001"][one], samples["00000001"][other]
    places = slice(first, first + size), slice(second, second + size)
    content[places[0]], content[places[1]] = content[places[1]], content[places[0]]
    path.write_bytes(content)
    with pytest.raises(TrajectoryError, match=rf"shard-000000\.tar: sample 00000001: {one}: checksum differs"):
        list(read_shard(folder, 0, Card.read(folder)))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ([1024, 240, "0" * 16], "c01.npy: checksum differs"),
        ([1024, 239, "0" * 16], "c01.npy: expected 240 bytes .* found 239"),
        ([10**15, 240, "0" * 16], "c01.npy: ends at byte 10{15}"),
        ([-2, 240, "0" * 16], "Invalid argument"),
        (["0", 240, "0" * 16], "str"),
        ([1024, 240], "not enough values"),
        (None, "'c01.npy' is missing"),
    ],
)
def test_index_that_disagrees_with_the_tar_is_refused(folder: Path, entry: Any, message: str) -> None:
    samples = json.loads((folder / "shard-000000.json").read_text())["samples"]
    samples["00000000"] |= {"c01.npy": entry}
    if entry is None:
        del samples["00000000"]["c01.npy"]
    edit_index(folder, 0, samples=samples)
    with pytest.raises(TrajectoryError, match=rf"shard-000000\.tar: sample 00000000: .*{message}"):
        list(read_shard(folder, 0, Card.read(folder)))
    assert any("sample 00000000: " in problem for problem in problems(folder))


@pytest.mark.parametrize("size", [2**62, -1])
def test_member_of_absurd_size_takes_no_memory(folder: Path, size: int) -> None:
    samples = json.loads((folder / "shard-000000.json").read_text())["samples"]
    samples["00000000"]["json"][1] = size
    edit_index(folder, 0, samples=samples)
    with pytest.raises(TrajectoryError, match=rf"sample 00000000: json: {size} bytes in a shard of"):
        list(read_shard(folder, 0, Card.read(folder)))


def test_missing_index_is_named(folder: Path) -> None:
    (folder / "shard-000000.json").unlink()
    with pytest.raises(TrajectoryError, match=r"shard-000000\.json: expected the index of shard-000000\.tar"):
        list(read_shard(folder, 0, Card.read(folder)))


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


def npy(members: Members, content: bytes) -> bytes:
    """``content`` as an array of float32, as the first step has it."""
    return members["00000000.c00.npy"][:128] + content


FORGERIES: dict[str, tuple[Callable[[Members], Members], str]] = {
    "NaN": (
        lambda members: members | {"00000000.c00.npy": npy(members, b"\xff" * 240)},
        "features: expected finite float32",
    ),
    "token": (
        lambda members: members | {"00000000.tokens.npy": npy(members, b"\x05\0\0\0" * 9)},
        r"tokens: expected values in 0\.\.4",
    ),
    "step": (
        lambda members: members | {"00000000.committed_at.npy": npy(members, b"\xff" * 18)},
        r"committed_at: expected values in 0\.\.3",
    ),
    "rows": (
        lambda members: members | {"00000000.u00.npy": npy(members, bytes(264))},
        "features: expected 10 rows in each of 2 branches, found .10, 11.",
    ),
    "other sample": (replaced("00000000.json", b'{"id": 2, "seed": 0, "label": 0}'), "json: expected id, seed, label"),
    "facts of another kind": (replaced("00000000.json", b'{"id": 0, "seed": "0", "label": 0}'), "json: expected id"),
    "no facts": (replaced("00000000.json", b"[" * 100_000), "maximum recursion depth"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_forged_sample_is_refused_by_name(folder: Path, name: str) -> None:
    change, message = FORGERIES[name]
    forge(folder, 0, change)
    with pytest.raises(TrajectoryError, match=rf"shard-000000\.tar: sample 00000000: .*({message})"):
        list(read_shard(folder, 0, Card.read(folder)))
    assert any("sample 00000000: " in problem for problem in problems(folder))


@pytest.mark.parametrize("name", ["00000000.c00.npy", "00000000.json", "whole file"])
def test_pickle_in_disguise_is_refused_and_not_run(folder: Path, tmp_path: Path, name: str) -> None:
    content = pickle.dumps(Payload(tmp_path / "ran"))
    if name == "whole file":
        (folder / shard_name(0)).write_bytes(content)
        edit_index(folder, 0, bytes=len(content))
    else:
        forge(folder, 0, replaced(name, content))
    with pytest.raises(TrajectoryError, match=r"shard-000000\.tar: sample 00000000"):
        list(read_shard(folder, 0, Card.read(folder)))
    assert list(problems(folder))
    assert not (tmp_path / "ran").exists()
    pickle.loads(content)
    assert (tmp_path / "ran").exists()  # it would have


def test_interface_of_another_base_is_refused(folder: Path) -> None:
    other = TokenInterface(9, *(tensor + 1 for tensor in interface().state_dict().values()))
    save_interface(folder, other)
    with pytest.raises(TrajectoryError, match=r"interface\.safetensors: expected the interface \S+ named"):
        load_interface(folder, Card.read(folder))


def test_shard_of_another_set_is_refused(folder: Path, tmp_path: Path) -> None:
    write_set(tmp_path / "other", num_samples=3, samples_per_shard=2, base={"fingerprint": "feedfeedfeedfeed"})
    for name in ("shard-000000.tar", "shard-000000.json"):
        shutil.copy(tmp_path / "other" / name, folder / name)
    with pytest.raises(TrajectoryError, match=r"shard-000000\.json: expected a shard of set"):
        list(read_shard(folder, 0, Card.read(folder)))


# ---- files that cannot be read are no damage


def test_read_error_of_the_disk_names_the_shard(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("os.preadv", broken)
    with pytest.raises(TrajectoryError, match=r"shard-000000\.tar: sample 00000000: .*Input/output error"):
        list(read_shard(folder, 0, Card.read(folder)))


def test_shard_that_cannot_be_fetched_is_never_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_set(tmp_path, num_samples=6, samples_per_shard=2)

    def away(*_: object) -> None:
        raise AccessError("the host is away")

    monkeypatch.setattr("lit_shortcut.trajectory.source.Source.read", away)
    data = module(tmp_path, on_corrupt="skip")
    for loader in (data.train_dataloader(), data.val_dataloader()):
        with pytest.raises(AccessError, match="the host is away"):
            next(iter(loader))


# ---- on_corrupt: skip


def flip(folder: Path, index: int, sample: str) -> None:
    """Damage the last byte of the features of ``sample`` at its last step."""
    path = folder / shard_name(index)
    with tarfile.open(path) as tar:
        member = tar.getmember(f"{sample}.u03.npy")
    content = bytearray(path.read_bytes())
    content[member.offset_data + member.size - 1] ^= 1
    path.write_bytes(content)


def module(folder: Path, **arguments: Any) -> TrajectoryDataModule:
    return make(folder, batch_size=9, **arguments)


def seen(made: TrajectoryDataModule) -> list[tuple[int, int]]:
    """Sample and step of each transition."""
    batches = [made.on_before_batch_transfer(batch, 0) for batch in made.train_dataloader()]
    assert {len(batch.replaced) for batch in batches} == {9}
    decoded = [batch.decode() for batch in batches]
    return [
        (round(float(features)), int(step))
        for batch in decoded
        for features, step in zip(batch.features[:, 0, 0], batch.step, strict=True)
    ]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_skipped_sample_is_replaced_counted_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, num_workers: int
) -> None:
    write_set(tmp_path, encoding="int8")
    whole = seen(module(tmp_path))
    forge(tmp_path, 1, replaced("00000004.tokens.npy", b"nothing"))
    with pytest.raises(TrajectoryError, match=r"shard-000001\.tar: sample 00000004"):
        seen(module(tmp_path))
    made = module(tmp_path, on_corrupt="skip", num_workers=num_workers)
    found = seen(made)
    kept = [(old, new) for old, new in zip(whole, found, strict=True) if old[0] != 4]
    assert all(old == new for old, new in kept)
    assert 4 not in {sample for sample, _ in found}
    assert made.num_replaced == len(whole) - len(kept) == 2 * 3
    made.teardown("fit")
    assert "6 damaged training transitions were replaced by others" in caplog.text
    assert "shard-000001.tar: sample 00000004: " in caplog.text


def test_missing_shard_is_skipped_when_asked_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_set(tmp_path)
    (tmp_path / shard_name(1)).unlink()
    made = module(tmp_path, on_corrupt="skip")
    assert "shard-000001.tar: missing" in caplog.text
    assert {sample for sample, _ in seen(made)} == {0, 1, 2, 6, 7, 8}
    assert made.num_replaced == 18


def test_validation_goes_on_without_a_damaged_trajectory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_set(tmp_path)
    flip(tmp_path, 3, "00000010")
    with pytest.raises(TrajectoryError, match="sample 00000010"):
        list(module(tmp_path).val_dataloader())
    (batch,) = module(tmp_path, on_corrupt="skip").val_dataloader()
    assert batch.conditions.ids.tolist() == [9]
    assert torch.equal(batch.features, trajectories([9]).features)
    assert "skipped: " in caplog.text
    flip(tmp_path, 3, "00000009")
    assert list(module(tmp_path, on_corrupt="skip").val_dataloader()) == []


def test_set_of_which_nothing_is_readable_is_refused_even_then(tmp_path: Path) -> None:
    write_set(tmp_path)
    for index in range(3):
        (tmp_path / shard_name(index)).unlink()
    with pytest.raises(TrajectoryError, match="no window is readable"):
        seen(module(tmp_path, on_corrupt="skip"))


# ---- verify


def verify(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    code = 0
    try:
        main(["verify", str(folder)])
    except SystemExit as stopped:
        code = int(str(stopped.code))
    return code, capsys.readouterr().out.splitlines()


def test_verify_finds_nothing_wrong_with_a_sound_set(sound: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(sound, capsys) == (0, [f"{sound}: sound"])


def test_verify_names_each_damaged_file_and_ends_with_exit_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_set(tmp_path)
    flip(tmp_path, 0, "00000001")
    (tmp_path / shard_name(1)).unlink()
    (tmp_path / "shard-000002.json").write_text("{}")
    shutil.copy(tmp_path / shard_name(3), tmp_path / shard_name(9))
    (tmp_path / "interface.safetensors").write_bytes(b"")
    code, lines = verify(tmp_path, capsys)
    assert code == 1
    assert lines[-1] == f"{tmp_path}: problems: 6"
    for start in (
        "interface.safetensors: not a readable safetensors file",
        "shard-000009.tar: not a shard of this set, which has 4",
        "shard-000000.tar: its checksum differs from shard-000000.json",
        "shard-000000.tar: sample 00000001: ",
        "shard-000001.tar: no readable shard",
        "shard-000002.json: expected the index of shard-000002.tar",
    ):
        assert any(line.startswith(f"{tmp_path}/{start}") for line in lines), start


def test_padding_is_checked_by_verify(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / shard_name(0)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert verify(folder, capsys)[0] == 1
