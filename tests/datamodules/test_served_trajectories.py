from __future__ import annotations

import errno
import json
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import fsspec
import pytest
import torch

from lit_shortcut.files import AccessError
from lit_shortcut.trajectory import TrajectoryError, problems
from lit_shortcut.trajectory.source import Source
from tests.datamodules.opened import make, names, order
from tests.tiny_trajectories import interface


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """The URL of ``folder``, and the paths that were asked for."""
    asked: list[str] = []

    class Noting(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            asked.append(self.path)

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Noting, directory=folder)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


@pytest.fixture
def bucket(folder: Path) -> Iterator[str]:
    """The set in memory, by its URL."""
    store = fsspec.filesystem("memory")
    store.put(f"{folder}/", "/bucket/set/", recursive=True)
    yield "memory://bucket/set"
    store.rm("/bucket", recursive=True)


def test_set_behind_http_is_read_like_a_folder(folder: Path, tmp_path: Path) -> None:
    with served(folder) as (url, _):
        module = make(url, cache=tmp_path, shuffle_shards=1)
        assert order(module) == order(make(folder, shuffle_shards=1))
        assert torch.equal(module.interface.head_weight, interface().head_weight)
        assert [batch.conditions.ids.tolist() for batch in module.val_dataloader()] == [[15, 16]]
        module.teardown("fit")
        assert len(list(tmp_path.glob("*/shard-*.tar"))) <= 3  # this group's, its neighbour's, the validation's
        with pytest.raises(AccessError, match=r"nowhere/card\.json: cannot be fetched \(FileNotFoundError"):
            make(f"{url}/nowhere")


def test_what_a_killed_fetch_left_in_the_cache_is_deleted(folder: Path, tmp_path: Path, bucket: str) -> None:
    order(make(bucket, cache=tmp_path))
    (shard,) = tmp_path.glob("*/shard-000001.tar")
    (leftover := shard.with_name(".shard-000002.tar.4711")).write_bytes(b"part")
    shard.unlink()
    order(make(bucket, cache=tmp_path))
    assert not leftover.exists()


def test_cache_without_locks_is_refused_with_a_way_out(
    tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("lit_shortcut.files.fcntl.flock", flock)
    with pytest.raises(AccessError, match=rf"{tmp_path}.*cannot be locked.*a file system with locks"):
        order(make(bucket, cache=tmp_path))


def test_shards_needed_first_are_fetched_first(tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[int]] = []
    read: list[int] = []

    def noted(self: Source, index: int, use: Any, own: Any = Source.read) -> Any:
        read.append(index)
        return own(self, index, use)

    monkeypatch.setattr(Source, "read", noted)
    monkeypatch.setattr(Source, "fetch_ahead", lambda self, indices: asked.append(list(indices)))
    order(make(bucket, cache=tmp_path, shuffle_shards=2))
    first, second, *_ = dict.fromkeys(read)
    assert {first, second} == set(asked[0][:2])
    assert len(set(asked[0])) == 4  # and then the next group


def test_set_in_an_object_store_is_read_like_a_folder(folder: Path, tmp_path: Path, bucket: str) -> None:
    assert order(make(bucket, cache=tmp_path, num_workers=2)) == order(make(folder))
    assert list(problems(bucket, tmp_path)) == []


def test_verification_reads_the_store_and_not_what_a_training_keeps_of_it(
    folder: Path, tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_shortcut.trajectory.source._CACHE", tmp_path)
    order(make(bucket))
    kept = sorted(tmp_path.glob("*/shard-*.tar"))
    assert len(kept) > 1
    fsspec.filesystem("memory").pipe("/bucket/set/shard-000001.tar", b"half")
    assert any("shard-000001.tar" in problem for problem in problems(bucket))
    assert sorted(tmp_path.glob("*/shard-*.tar")) == kept


@pytest.mark.parametrize(("protocol", "extra"), [("s3", "s3"), ("gs", "gs"), ("gcs", "gs")])
def test_missing_package_of_a_protocol_is_named_by_its_extra(
    protocol: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("s3fs", "gcsfs"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(AccessError, match=rf"{protocol}://.*pip install 'lit-shortcut\[{extra}\]'"):
        make(f"{protocol}://bucket/set")


def test_unknown_protocol_is_named() -> None:
    with pytest.raises(AccessError, match=r"nowhere://bucket/set/card\.json: .*Protocol not known: nowhere"):
        make("nowhere://bucket/set")


def damage(path: Path) -> None:
    """Flip a bit of the last step of the last sample."""
    samples = json.loads(path.with_suffix(".json").read_text())["samples"]
    offset, _, _ = samples[max(samples)]["u03.npy"]
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def test_shard_damaged_in_the_cache_is_fetched_again(folder: Path, tmp_path: Path, bucket: str) -> None:
    expected = order(make(bucket, cache=tmp_path))
    (path,) = tmp_path.glob("*/shard-000001.tar")
    damage(path)
    assert order(make(bucket, cache=tmp_path)) == expected
    path.write_bytes(b"half")
    assert order(make(bucket, cache=tmp_path)) == expected
    path.with_suffix(".json").write_text("half")
    assert order(make(bucket, cache=tmp_path)) == expected


def test_damaged_shard_behind_a_url_is_fetched_twice_and_only_its_damaged_sample_skipped(
    folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path / "set")
    damage(tmp_path / "set" / "shard-000001.tar")
    with served(tmp_path / "set") as (url, asked):
        module = make(url, cache=tmp_path / "cache", on_corrupt="skip", batch_size=9)
        seen = [name for batch in module.train_dataloader() for name in names(batch.decode())]
    assert len(seen) - len(set(seen)) == 1  # the last window of the sample's second branch
    assert asked.count("/shard-000001.tar") == 2
    with (
        served(tmp_path / "set") as (url, _),
        pytest.raises(TrajectoryError, match=r"http.*shard-000001\.tar: sample 00000005: u03.npy: checksum differs"),
    ):
        order(make(url, cache=tmp_path / "other", batch_size=9))


def test_shards_of_the_next_group_are_fetched_while_one_is_read(folder: Path, tmp_path: Path) -> None:
    with served(folder) as (url, asked):
        module = make(url, cache=tmp_path, shuffle_shards=2, num_workers=0)
        next(iter(module.train_dataloader()))
        deadline = time.monotonic() + 60
        while len(set(asked) & {f"/shard-{index:06d}.tar" for index in range(5)}) < 4 and time.monotonic() < deadline:
            time.sleep(0.05)
        module.teardown("fit")
        assert len([path for path in asked if path.endswith(".tar")]) == 4
