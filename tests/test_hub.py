from __future__ import annotations

from pathlib import Path

import huggingface_hub.constants
import pytest

from lit_shortcut.hub import at_revision, local_file, local_folder
from lit_shortcut.weights import WeightsError

ADDRESS = "hf://owner/weights/folder/net.pth"


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As with HF_HUB_OFFLINE=1 and an HF_HOME of one's own, which the library reads when it is imported."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def cached(folder: Path, revision: str, content: bytes) -> None:
    """A file in the hub's cache, as a download leaves it."""
    snapshot = folder / "models--owner--weights" / "snapshots" / revision / "folder"
    snapshot.mkdir(parents=True)
    (snapshot / "net.pth").write_bytes(content)


def test_path_stays_as_it_is() -> None:
    assert local_file("some/where.pth") == Path("some/where.pth")
    assert local_file("/absent") == Path("/absent")


def test_file_in_the_cache_is_found_without_a_network(offline: Path) -> None:
    first, second = "a" * 40, "b" * 40
    cached(offline, first, b"first")
    cached(offline, second, b"second")
    refs = offline / "models--owner--weights" / "refs"
    refs.mkdir()
    (refs / "main").write_text(first)
    assert local_file(ADDRESS).read_bytes() == b"first"
    assert local_file(f"hf://owner/weights@{second}/folder/net.pth").read_bytes() == b"second"


def test_missing_access_says_what_to_download_and_where_to_put_it(offline: Path) -> None:
    with pytest.raises(WeightsError) as caught:
        local_file(ADDRESS)
    message = str(caught.value)
    assert message.startswith(f"{ADDRESS}: not in the hub's cache")
    assert "https://huggingface.co/owner/weights/resolve/main/folder/net.pth" in message
    assert "path of the file" in message
    assert "`hf download owner/weights folder/net.pth`" in message
    assert "HF_HOME" in message


@pytest.mark.parametrize("address", ["hf://owner", "hf://", "hf://a/b/../c"])
def test_malformed_address_is_refused_by_name(address: str) -> None:
    with pytest.raises(WeightsError, match=f"{address}: "):
        local_file(address)


@pytest.mark.parametrize("address", ["hf://datasets/owner/weights/net.pth", "hf://owner/weights"])
def test_what_is_no_file_of_a_model_is_refused(address: str) -> None:
    with pytest.raises(WeightsError, match=f"{address}: expected hf://owner/repository/file of a model"):
        local_file(address)


def test_part_of_a_repository_is_refused_as_a_folder() -> None:
    with pytest.raises(WeightsError, match="text_encoder: expected hf://owner/repository of a model"):
        local_folder("hf://owner/weights/text_encoder", ["*"])


@pytest.mark.parametrize(
    ("address", "pinned"),
    [
        ("hf://owner/weights", "hf://owner/weights@abc"),
        ("hf://owner/weights@old", "hf://owner/weights@abc"),
        (ADDRESS, "hf://owner/weights@abc/folder/net.pth"),
        ("hf://gpt2", "hf://gpt2"),  # refused by name when it is opened
    ],
)
def test_revision_goes_behind_the_repository(address: str, pinned: str) -> None:
    assert at_revision(address, "abc") == pinned
    assert at_revision(address, "") == address


def test_folder_in_the_cache_is_found_without_a_network(offline: Path) -> None:
    revision = "c" * 40
    cached(offline, revision, b"whole")
    folder = local_folder(f"hf://owner/weights@{revision}", ["folder/*"])
    assert (folder / "folder/net.pth").read_bytes() == b"whole"
    assert local_folder("some/where", ["*"]) == Path("some/where")


def test_missing_folder_says_what_to_download_and_where_to_put_it() -> None:
    with pytest.raises(WeightsError, match=r"`hf download owner/weights --include 'a\*' 'b' --local-dir FOLDER`"):
        local_folder("hf://owner/weights", ["a*", "b"])
    with pytest.raises(WeightsError, match="hf://owner: expected hf://owner/repository"):
        local_folder("hf://owner", ["*"])
