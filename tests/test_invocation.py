from __future__ import annotations

import shlex

import pytest

from lit_shortcut.invocation import command


def test_command_can_be_pasted_into_a_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["generate", "--prompt", "a dark, wide coat", "--model.rows", "[[16], [16, 3, shortcut]]"]
    monkeypatch.setattr("sys.argv", ["/somewhere/bin/lit-shortcut", *words])
    assert shlex.split(command()) == ["lit-shortcut", *words]
