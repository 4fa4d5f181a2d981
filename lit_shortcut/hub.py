"""Files and folders of the Hugging Face hub, named by ``hf://`` addresses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfUri, hf_hub_download, hf_hub_url, parse_hf_uri, snapshot_download

from lit_shortcut.inputs import located
from lit_shortcut.weights import WeightsError, first_sentence

_FILE, _REPOSITORY = "hf://owner/repository/file", "hf://owner/repository"


def local_file(address: str) -> Path:
    """Return the path of the file at ``address``, or of its copy in the hub's cache, downloaded once.

    Args:
        address: a path, or ``hf://owner/repository/file``, ``hf://owner/repository@revision/file``.

    Raises:
        WeightsError: if the file is unavailable; the message says what to download and where to put it.
    """
    if not address.startswith("hf://"):
        return located(address)
    place = _parsed(address, _FILE)
    try:
        return Path(hf_hub_download(place.id, place.path_in_repo, revision=place.revision))
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"{address}: not in the hub's cache, and the download failed ({first_sentence(error)}). With a network, "
            f"download {hf_hub_url(place.id, place.path_in_repo, revision=place.revision)} and give the path of the "
            f"file (or its folder, if a folder is expected) in place of the address; or run "
            f"`hf download {place.id} {place.path_in_repo}` and copy the cache (HF_HOME)"
        ) from error


def local_folder(address: str, patterns: Sequence[str]) -> Path:
    """Return the path of the folder at ``address``, or of the repository's copy in the hub's cache, downloaded once.

    Args:
        address: a path, or ``hf://owner/repository``, ``hf://owner/repository@revision``.
        patterns: patterns of the repository's files to download.

    Raises:
        WeightsError: if they are unavailable; the message says what to download and where to put it.
    """
    if not address.startswith("hf://"):
        return located(address)
    place = _parsed(address, _REPOSITORY)
    try:
        return Path(snapshot_download(place.id, revision=place.revision, allow_patterns=list(patterns)))
    except (OSError, ValueError) as error:
        wanted = " ".join(f"'{pattern}'" for pattern in patterns)
        raise WeightsError(
            f"{address}: not in the hub's cache, and the download failed ({first_sentence(error)}). With a network, "
            f"run `hf download {place.id} --include {wanted} --local-dir FOLDER`, and give FOLDER in place of the "
            "address"
        ) from error


def at_revision(address: str, revision: str) -> str:
    """Return the ``hf://`` ``address`` of a repository or a file in it at ``revision``, unless that is empty."""
    owner, slash, rest = address.removeprefix("hf://").partition("/")
    if not revision or not slash:
        return address
    repository, slash, path = rest.partition("/")
    return f"hf://{owner}/{repository.partition('@')[0]}@{revision}{slash}{path}"


def _parsed(address: str, form: str) -> HfUri:
    """Parse the address of a model's repository, or of a file in one, whichever ``form`` is."""
    try:
        place = parse_hf_uri(address)
    except ValueError as error:
        raise WeightsError(f"{address}: expected {form} ({error})") from error
    if place.type != "model" or bool(place.path_in_repo) != (form == _FILE):
        raise WeightsError(f"{address}: expected {form} of a model")
    return place
