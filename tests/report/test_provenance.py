from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from lit_shortcut.report.provenance import commit, provenance

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="no git on this machine")


def git(folder: Path, *words: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    return subprocess.run(
        ["git", "-C", folder, *who, *words], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_commit_is_that_of_the_checkout_that_tracks_the_file(tmp_path: Path) -> None:
    source = tmp_path / "package" / "module.py"
    source.parent.mkdir()
    source.write_text("1")
    assert commit(source) is None  # no checkout
    git(tmp_path, "init", "-q")
    (tmp_path / "other").write_text("1")
    git(tmp_path, "add", "other")
    git(tmp_path, "commit", "-qm", "other")
    assert commit(source) is None  # in a checkout that knows nothing of it, as an environment inside a project
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "module")
    assert commit(source) == git(tmp_path, "rev-parse", "--short=12", "HEAD")
    source.write_text("2")
    assert commit(source) == git(tmp_path, "rev-parse", "--short=12", "HEAD") + "-dirty"


def test_provenance_leaves_out_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_shortcut.report.provenance._PACKAGES", ("torch", "no-such-package"))
    assert {"commit", "python", "torch", "command"} == provenance().keys()
