"""Files and folders of the Hugging Face hub, named by ``hf://`` addresses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfUri, hf_hub_download, hf_hub_url, parse_hf_uri, snapshot_download

from lit_shortcut.places import located
from lit_shortcut.weights import WeightsError, first_sentence


def local_file(address: str) -> Path:
    """Where the file at path ``address`` is; else its copy in the hub's cache, downloaded once.

    Args:
        address: a path, or ``hf://owner/repository/file``, ``hf://owner/repository@revision/file``.

    Raises:
        WeightsError: if the file cannot be had; the message says which to download and where to put it.
    """
    if not address.startswith("hf://"):
        return located(address)
    place = _parsed(address, "hf://owner/repository/file")
    try:
        return Path(hf_hub_download(place.id, place.path_in_repo, revision=place.revision))
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"{address}: not in the hub's cache and not to be downloaded ({first_sentence(error)}). Download "
            f"{hf_hub_url(place.id, place.path_in_repo, revision=place.revision)} where there is a network and give "
            f"the path of the file (of its folder, where a folder is asked for) in place of the address; or run "
            f"`hf download {place.id} {place.path_in_repo}` there and copy its cache, which HF_HOME names"
        ) from error


def local_folder(address: str, patterns: Sequence[str]) -> Path:
    """Where the folder at path ``address`` is; else the repository's copy in the hub's cache, downloaded once.

    Args:
        address: a path, or ``hf://owner/repository``, ``hf://owner/repository@revision``.
        patterns: files wanted of the repository.

    Raises:
        WeightsError: if they cannot be had; the message says what to download and where to put it.
    """
    if not address.startswith("hf://"):
        return located(address)
    place = _parsed(address, "hf://owner/repository")
    try:
        return Path(snapshot_download(place.id, revision=place.revision, allow_patterns=list(patterns)))
    except (OSError, ValueError) as error:
        wanted = " ".join(f"'{pattern}'" for pattern in patterns)
        raise WeightsError(
            f"{address}: not in the hub's cache and not to be downloaded ({first_sentence(error)}). Where there is a "
            f"network run `hf download {place.id} --include {wanted} --local-dir FOLDER`, and give FOLDER in place of "
            "the address"
        ) from error


def _parsed(address: str, form: str) -> HfUri:
    try:
        return parse_hf_uri(address)
    except ValueError as error:
        raise WeightsError(f"{address}: expected {form} ({error})") from error
