"""Conditions of images to generate: prompts from a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datamodules.conditions import InTurn, hash_of
from lit_shortcut.contracts import Conditions
from lit_shortcut.inputs import located


def read_prompts(path: Path) -> list[str]:
    """Read the prompts in the file ``path``, at least one.

    ``.txt`` holds a prompt per line; ``.jsonl`` a JSON value per line, ``.json`` a list of them: strings, or objects
    with the key ``prompt``. Text is UTF-8, with or without a byte order mark; blank lines at the end are ignored.

    Raises:
        ValueError: naming the file, if it is missing, unreadable or of another kind, or a prompt is empty.
    """
    if path.suffix not in _READERS:
        raise ValueError(f"{path}: expected a file of prompts ending in {', '.join(_READERS)}")
    try:
        values = _READERS[path.suffix](located(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a readable file of prompts ({error})") from error
    if not isinstance(values, list):
        raise ValueError(f"{path}: expected a JSON list of prompts, found {type(values).__name__}")
    prompts = [_prompt(value, f"{path}: prompt {number}") for number, value in enumerate(values, start=1)]
    if not prompts:
        raise ValueError(f"{path}: expected at least one prompt, found none")
    return prompts


class Prompts(InTurn):
    """``num_images`` images, prompts in turn. Image i depends only on ``seed``, its prompt and i.

    Args:
        path: ``.txt``, ``.json`` or ``.jsonl`` file, see :func:`read_prompts`.
        num_images: number of images to generate; None generates one for each prompt. Prompts repeat if there are more
            images.
        batch_size: images per batch; predict records each batch as one shard.
        seed: run seed.
        run_seeds: ``test`` generates all images under each of these; None takes only ``seed``.

    Raises:
        ValueError: if the file does not hold prompts.
    """

    def __init__(
        self,
        path: Path,
        num_images: int | None = None,
        batch_size: int = 1,
        seed: int = 0,
        run_seeds: list[int] | None = None,
    ) -> None:
        self.prompts = read_prompts(Path(path))
        self.prompts_sha256 = hash_of(self.prompts)
        count = len(self.prompts) if num_images is None else num_images
        super().__init__(count, batch_size, seed, len(self.prompts), run_seeds)

    def asked_for(self, conditions: Conditions) -> Conditions:
        """Return ``conditions`` with the prompts that their labels stand for."""
        return conditions._replace(prompts=tuple(self.prompts[label] for label in conditions.labels.tolist()))


def _lines(text: str) -> list[str]:
    """Split ``text`` at newlines; ``splitlines`` would also split at separators within prompts."""
    return text.rstrip().split("\n") if text.strip() else []


def _json_lines(text: str) -> list[Any]:
    values = []
    for number, line in enumerate(_lines(text), start=1):
        try:
            values.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number}, column {error.colno}: {error.msg}") from error
    return values


_READERS: dict[str, Callable[[str], Any]] = {".txt": _lines, ".json": json.loads, ".jsonl": _json_lines}


def _prompt(value: Any, where: str) -> str:
    prompt = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(prompt, str):
        raise ValueError(f"{where}: expected a string, or an object with the key 'prompt', found {value!r}")
    if not prompt.strip():
        raise ValueError(f"{where}: expected a text, found an empty one")
    return prompt.strip()
