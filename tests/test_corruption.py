"""Sets damaged by accident or by intent: refused by name, or skipped and counted; never silent, never run."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from datamodules.trajectories import TrajectoryDataModule
from lit_shortcut.cli import main
from lit_shortcut.interface import TokenInterface
from lit_shortcut.trajectory import (
    AccessError,
    Card,
    TrajectoryError,
    load_interface,
    problems,
    read_shard,
    save_interface,
    shard_name,
    stack,
)
from lit_shortcut.weights import WeightsError, fingerprint
from tests.forged_shards import Members, edit_sidecar, forge, with_tensors
from tests.tiny_trajectories import SPEC, adopt, card, interface, trajectories, write_set

FIRST = "00000000.safetensors"


def everything(folder: Path) -> list[Tensor]:
    """All that a reader gets from the set in ``folder``."""
    made = Card.read(folder)
    samples = stack([one for index in range(made.num_shards) for one in read_shard(folder, index, made)])
    conditions = samples.conditions
    return [
        *load_interface(folder, made).state_dict().values(),
        *(conditions.ids, conditions.seeds, conditions.labels),
        *samples[1:4],
    ]


@pytest.fixture(scope="module", params=["int8", "float32"])
def sound(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    write_set(folder, num_samples=3, samples_per_shard=2, dtype=request.param)
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
        else:  # padding between members, a blank of JSON, the sha256 that verify alone compares
            assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
            assert told or name == "card.json"
    assert len(refused) > 15
    for message, told in refused:
        assert name.partition(".")[0] in message
        assert told


def test_every_tensor_of_every_sample_is_guarded(sound: Path, folder: Path) -> None:
    made = Card.read(folder)
    path = folder / shard_name(0)
    with tarfile.open(path) as tar:
        places = [member.offset_data for member in tar.getmembers()] + [path.stat().st_size - 10240]
    content = path.read_bytes()
    for start, stop in pairwise(places):
        for place in range(start, stop - 1100, 997):  # not in the padding and header before the next member
            path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            with pytest.raises(TrajectoryError, match=r"shard-000000\.tar: sample 0000000[01]: "):
                list(read_shard(folder, 0, made))


# ---- shards whose checksums vouch for what they should not hold


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


def renamed(old: str, new: str) -> Callable[[Members], Members]:
    return lambda members: {new if name == old else name: value for name, value in members.items()}


def replaced(name: str, content: bytes) -> Callable[[Members], Members]:
    return lambda members: members | {name: content}


def set_to(name: str, value: float) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors[name].view(-1)[:1].fill_(value)


def header(entries: object, payload: int = 8) -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + bytes(payload)


FORGERIES: dict[str, tuple[Callable[[Members], Members], str]] = {
    "NaN": (with_tensors("00000000", set_to("features", torch.nan)), "features: expected finite float32"),
    "infinity": (with_tensors("00000000", set_to("features", torch.inf)), "features: expected finite float32"),
    "token": (with_tensors("00000000", set_to("tokens", 5)), r"tokens: expected values in 0\.\.4"),
    "step": (with_tensors("00000000", set_to("committed_at", -1)), r"committed_at: expected values in 0\.\.3"),
    "dtype": (
        with_tensors("00000000", lambda tensors: tensors.update(features=tensors["features"].half())),
        "features: expected torch.float32 .* found torch.float16",
    ),
    "shape": (
        with_tensors("00000000", lambda tensors: tensors.update(tokens=tensors["tokens"][:4].clone())),
        r"tokens: expected torch.int32 \(9,\), found torch.int32 \(4,\)",
    ),
    "tensor missing": (with_tensors("00000000", lambda tensors: tensors.pop("tokens")), "'tokens' is missing"),
    "tensor too many": (
        with_tensors("00000000", lambda tensors: tensors.update(code=torch.zeros(1))),
        "'code' is no tensor of a sample",
    ),
    "member missing": (
        lambda members: {name: value for name, value in members.items() if name != "00000000.json"},
        "expected member 00000000.json at byte",
    ),
    "path upwards": (renamed(FIRST, f"../../{FIRST}"), r"expected member .* found '\.\./\.\./00000000"),
    "path from root": (renamed(FIRST, f"/tmp/{FIRST}"), "expected member .* found '/tmp/00000000"),
    "other sample": (replaced("00000000.json", b'{"id": 2, "seed": 0, "label": 0}'), "of sample 0, found"),
    "facts of another kind": (
        replaced("00000000.json", b'{"id": 0, "seed": "0", "label": 0}'),
        "facts: expected id, label",
    ),
    "seed of 70 bits": (
        replaced("00000000.json", b'{"id": 0, "seed": 1180591620717411303424, "label": 0}'),
        "facts: expected id, label",
    ),
    "sizes that are no whole numbers": (
        replaced(FIRST, header({"features": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}})),
        "no safetensors header: sizes that are no whole numbers",
    ),
    "no facts": (replaced("00000000.json", b"[" * 100_000), "facts: expected JSON"),
    "header of 2^62 bytes": (replaced(FIRST, (2**62).to_bytes(8, "little") + bytes(64)), "no safetensors header"),
    "tensor of 2^62 bytes": (
        replaced(FIRST, header({"features": {"dtype": "F32", "shape": [2**60], "data_offsets": [0, 2**62]}})),
        "no safetensors header: offsets|no safetensors header: tensors that end",
    ),
    "overlapping tensors": (
        replaced(
            FIRST, header({name: {"dtype": "I16", "shape": [4], "data_offsets": [0, 8]} for name in ("tokens", "x")})
        ),
        "no safetensors header: offsets",
    ),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_forged_sample_is_refused_by_name(tmp_path: Path, name: str) -> None:
    made = write_set(tmp_path, num_samples=3, samples_per_shard=2)
    change, message = FORGERIES[name]
    forge(tmp_path, 0, made, change)
    with pytest.raises(TrajectoryError, match=rf"shard-000000\.tar: sample 00000000: .*({message})"):
        list(read_shard(tmp_path, 0, made))
    assert any("sample 00000000: " in problem for problem in problems(tmp_path))


def test_scale_that_is_no_number_is_refused(tmp_path: Path) -> None:
    made = write_set(tmp_path, num_samples=3, samples_per_shard=2, dtype="int8")
    forge(tmp_path, 0, made, with_tensors("00000000", set_to("scales", torch.nan)))
    with pytest.raises(TrajectoryError, match="sample 00000000: scales: expected finite float32"):
        list(read_shard(tmp_path, 0, made))


@pytest.mark.parametrize("name", [FIRST, "00000000.json", "00000001.pkl", "whole file"])
def test_pickle_in_disguise_is_refused_and_not_run(tmp_path: Path, name: str) -> None:
    made = write_set(tmp_path / "set", num_samples=3, samples_per_shard=2)
    content = pickle.dumps(Payload(tmp_path / "ran"))
    if name == "whole file":
        (tmp_path / "set" / shard_name(0)).write_bytes(content)
        edit_sidecar(tmp_path / "set", 0, bytes=len(content))
    else:
        forge(tmp_path / "set", 0, made, replaced(name, content))
    with pytest.raises(TrajectoryError, match=r"shard-000000\.tar: (sample|expected no member behind sample) 0000000"):
        list(read_shard(tmp_path / "set", 0, made))
    assert list(problems(tmp_path / "set"))
    assert not (tmp_path / "ran").exists()
    pickle.loads(content)
    assert (tmp_path / "ran").exists()  # it would have


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE])
def test_member_that_is_no_file_is_refused(tmp_path: Path, kind: bytes) -> None:
    made = write_set(tmp_path, num_samples=3, samples_per_shard=2)
    member = tarfile.TarInfo(FIRST)
    member.type, member.linkname = kind, "/etc/passwd"
    path = tmp_path / shard_name(0)
    path.write_bytes(member.tobuf() + path.read_bytes()[512:])
    with pytest.raises(TrajectoryError, match=f"sample 00000000: expected member {FIRST}"):
        list(read_shard(tmp_path, 0, made))


def test_member_that_declares_more_than_the_shard_holds_is_refused(tmp_path: Path) -> None:
    made = write_set(tmp_path, num_samples=3, samples_per_shard=2)
    member = tarfile.TarInfo(FIRST)
    member.size = 2**40
    path = tmp_path / shard_name(0)
    path.write_bytes(member.tobuf(tarfile.GNU_FORMAT) + path.read_bytes()[512:])
    with pytest.raises(TrajectoryError, match=f"{FIRST} declares 1099511627776 bytes in a shard of"):
        list(read_shard(tmp_path, 0, made))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_samples": 10**15}, r"expected at most 10000000 shards, its card tells 500000000000000"),
        ({"num_samples": 10**7}, r"shard-000002\.tar: no such shard; 4999998 of 5000000"),
        ({"samples_per_shard": 10**15, "num_samples": 2 * 10**15}, r"shard-000000\.json: expected .* 10{15} samples"),
        ({"num_steps": 10**12}, r"shard-000000\.json: expected .* 2 × 10{12} steps"),
        ({"spec": SPEC._asdict() | {"sequence_length": 10**12}}, r"features: expected .*10{12}, 6\), found"),
    ],
)
def test_card_that_claims_absurd_sizes_is_refused_before_memory_is_taken(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    write_set(tmp_path, num_samples=4, samples_per_shard=2)
    adopt(tmp_path, card(**({"num_samples": 4, "samples_per_shard": 2} | change)))

    def first_batch() -> None:
        data = TrajectoryDataModule(str(tmp_path), batch_size=2)
        data.setup("fit")
        next(iter(data.train_dataloader()))

    with pytest.raises(TrajectoryError, match=message):
        first_batch()


def test_sidecar_of_many_bytes_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = write_set(tmp_path)
    monkeypatch.setattr("lit_shortcut.trajectory.sidecar._LIMIT", 100)
    with pytest.raises(TrajectoryError, match=r"shard-000000\.json: expected at most 100 bytes, found more"):
        list(read_shard(tmp_path, 0, made))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("num_tokens"), "expected num_tokens, embedding and head of image tokens"),
        (lambda tensors: tensors["head_weight"].fill_(torch.nan), r"head_weight: expected finite numbers \(5, 6\)"),
        (lambda tensors: tensors.update(code_embedding=torch.zeros(5, 4)), r"code_embedding: .* found \(5, 4\)"),
    ],
)
def test_forged_interface_is_refused(folder: Path, change: Callable[[dict[str, Tensor]], object], message: str) -> None:
    path = folder / "interface.safetensors"
    tensors = load(path.read_bytes())
    change(tensors)
    path.write_bytes(save(tensors))
    adopt(folder, replace(Card.read(folder), interface=fingerprint(tensors)))
    with pytest.raises(TrajectoryError, match=message):
        load_interface(folder, Card.read(folder))
    assert any("interface.safetensors" in problem for problem in problems(folder))


def test_interface_of_another_base_is_refused(folder: Path) -> None:
    other = TokenInterface(9, *(tensor + 1 for tensor in interface().state_dict().values()))
    save_interface(folder, other)
    with pytest.raises(TrajectoryError, match=r"interface\.safetensors: expected the interface \w+ that"):
        load_interface(folder, Card.read(folder))


def test_shard_of_another_set_is_refused(folder: Path, tmp_path: Path) -> None:
    write_set(tmp_path / "other", num_samples=3, samples_per_shard=2, base_fingerprint="feedfeedfeedfeed")
    for name in ("shard-000000.tar", "shard-000000.json"):
        shutil.copy(tmp_path / "other" / name, folder / name)
    with pytest.raises(TrajectoryError, match=r"shard-000000\.json: expected a shard of set"):
        list(read_shard(folder, 0, Card.read(folder)))


# ---- files that cannot be read are no damage


def test_url_of_no_known_kind_is_told_with_the_way_out() -> None:
    with pytest.raises(AccessError, match=r"s3://bucket/set/card\.json: WebDataset opens no such URL .*GOPEN_REWRITE"):
        Card.read("s3://bucket/set")


def test_read_error_of_the_disk_names_the_shard(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("os.pread", broken)
    with pytest.raises(TrajectoryError, match=r"shard-000000\.tar: not readable at byte 0 \(Input/output error\)"):
        list(read_shard(folder, 0, Card.read(folder)))
    assert any("not readable" in problem for problem in problems(folder))


def test_shard_that_cannot_be_fetched_is_never_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_set(tmp_path, num_samples=6, samples_per_shard=2)

    def away(*_: object) -> None:
        raise AccessError("the host is away")

    monkeypatch.setattr("lit_shortcut.trajectory.source.Source.shard", away)
    data = module(tmp_path, on_corrupt="skip")
    for loader in (data.train_dataloader(), data.val_dataloader()):
        with pytest.raises(AccessError, match="the host is away"):
            next(iter(loader))


# ---- on_corrupt: skip


def flip(folder: Path, index: int, sample: str) -> None:
    """Damage the last byte of the features of ``sample``, one of its scales or of its last step's values."""
    path = folder / shard_name(index)
    with tarfile.open(path) as tar:
        member = tar.getmember(f"{sample}.safetensors")
    content = bytearray(path.read_bytes())
    content[member.offset_data + member.size - 1] ^= 1
    path.write_bytes(content)


def module(folder: Path, **arguments: Any) -> TrajectoryDataModule:
    made = TrajectoryDataModule(str(folder), batch_size=9, **arguments)
    made.trainer = SimpleNamespace(global_rank=0, world_size=1, current_epoch=0)  # type: ignore[assignment]
    made.setup("fit")
    return made


def seen(made: TrajectoryDataModule) -> list[tuple[int, int]]:
    """Sample and step of each transition."""
    batches = [made.on_before_batch_transfer(batch, 0) for batch in made.train_dataloader()]
    assert {len(batch.step) for batch in batches} == {9}
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
    write_set(tmp_path, dtype="int8")
    whole = seen(module(tmp_path))
    forge(tmp_path, 1, Card.read(tmp_path), replaced("00000004.safetensors", b"nothing"))
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
    assert "shard-000001.tar: no such shard" in caplog.text
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
        "shard-000009.tar: no shard of this set, which has 4",
        "shard-000000.tar: its sha256 differs from shard-000000.json",
        "shard-000000.tar: sample 00000001: ",
        "shard-000001.tar: no such shard",
        "shard-000002.json: expected size and checksums",
    ):
        assert any(line.startswith(f"{tmp_path}/{start}") for line in lines), start


def test_padding_is_checked_by_verify(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / shard_name(0)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert verify(folder, capsys)[0] == 1
