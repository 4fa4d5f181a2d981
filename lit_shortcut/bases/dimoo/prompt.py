"""Lumina-DiMOO's sequence: a text prompt, then the image's tokens in a frame of special ones."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Protocol

import torch
from tokenizers import Encoding, Tokenizer
from torch import Tensor

from lit_shortcut.inputs import located
from lit_shortcut.weights import WeightsError

TEMPLATE = "<system>Generate an image according to the text prompt.</system><user>{}</user>"
UNCONDITION = "<uncondition>"  # stands for the prompt in the unconditional branch


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the tokens that are not text; the defaults are the published ones.

    Args:
        mask: stands at unknown image places.
        newline: ends each row of the grid.
        boi: begins the image.
        eoi: ends the image.
        answer_start: follows the prompt.
        answer_end: last of the sequence.
        uncondition: ``<uncondition>``, prompt of the unconditional branch.
        first_code: id of code 0, from which the others follow.
    """

    mask: int = 126336
    newline: int = 126084
    boi: int = 126349
    eoi: int = 126350
    answer_start: int = 126354
    answer_end: int = 126355
    uncondition: int = 126351
    first_code: int = 126356


class PromptTokenizer(Protocol):
    """Text to token ids."""

    def encode(self, text: str, template: str = "{}") -> list[int]:
        """Token ids of ``template`` with ``text`` at ``{}``; special tokens are known in the template, not in text."""

    def identity(self) -> str:
        """Equal only for tokenizers that encode alike."""


class Utf8Tokenizer:
    """Bytes as tokens 0..255, and ``<uncondition>`` as one token: for small bases that ship no vocabulary.

    Args:
        uncondition: id of ``<uncondition>``.

    >>> Utf8Tokenizer(uncondition=256).encode("b", "a<uncondition>{}")
    [97, 256, 98]
    """

    def __init__(self, uncondition: int) -> None:
        self.uncondition = uncondition

    def encode(self, text: str, template: str = "{}") -> list[int]:
        """Token ids of ``template`` with ``text`` at ``{}``."""
        before, _, after = template.partition("{}")
        return self._known(before) + list(text.encode()) + self._known(after)

    def identity(self) -> str:
        """Name and id."""
        return f"utf8:{self.uncondition}"

    def _known(self, template: str) -> list[int]:
        first, *others = (list(part.encode()) for part in template.split(UNCONDITION))
        return first + [id_ for part in others for id_ in (self.uncondition, *part)]


class TextTokenizer:
    """A text tokenizer of the tokenizers library, such as a published checkpoint's own.

    Args:
        path: ``tokenizer.json``.
        special: ids that it must agree with; None for a model without these tokens.

    Raises:
        WeightsError: if the file is missing or damaged, does not know ``<uncondition>``, or knows a special token by
            another id.
    """

    def __init__(self, path: Path, special: SpecialTokens | None) -> None:
        path = located(path)
        if not path.is_file():
            raise WeightsError(f"{path}: no such file; expected a text tokenizer")
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises no narrower class
            raise WeightsError(f"{path}: not a tokenizer ({error})") from error
        self._tokenizer.no_truncation()  # the file may set either
        self._tokenizer.no_padding()
        content = json.loads(self._tokenizer.to_str())
        added = sorted((token["content"] for token in content["added_tokens"]), key=len, reverse=True)
        self._added = re.compile("|".join(map(re.escape, added)) or "(?!)")
        self._plain = Tokenizer.from_str(json.dumps(content | {"added_tokens": []}))
        if special is not None:
            self._require(special, path)

    def __len__(self) -> int:
        """Number of its tokens, added ones included."""
        size: int = self._tokenizer.get_vocab_size()
        return size

    def id_of(self, token: str) -> int | None:
        """Id of ``token``; None if it is unknown."""
        id_: int | None = self._tokenizer.token_to_id(token)
        return id_

    def encode(self, text: str, template: str = "{}") -> list[int]:
        """Token ids of ``template`` with ``text`` at ``{}``; special tokens are known in the template, not in text.

        The library splits a string at its special tokens and encodes the pieces between them separately. So does this,
        but the piece with ``text`` goes to a tokenizer without special tokens.
        """
        before, _, after = template.partition("{}")
        start = max((match.end() for match in self._added.finditer(before)), default=0)
        found = self._added.search(after)
        end = found.start() if found else len(after)
        pieces = [
            (self._tokenizer, before[:start]),
            (self._plain, before[start:] + text + after[:end]),
            (self._tokenizer, after[end:]),
        ]
        parts = [tokenizer.encode(piece, add_special_tokens=False) for tokenizer, piece in pieces if piece]
        ids: list[int] = self._tokenizer.post_process(Encoding.merge(parts)).ids
        return ids

    def identity(self) -> str:
        """Digest of vocabulary, merges and settings."""
        return sha256(self._tokenizer.to_str().encode()).hexdigest()[:16]

    def _require(self, special: SpecialTokens, path: Path) -> None:
        expected = {f"<{name}>": getattr(special, name) for name in ("boi", "eoi", "answer_start", "answer_end")}
        expected[UNCONDITION] = special.uncondition
        found = {token: self.id_of(token) for token in expected}
        harmless = {token for token, id_ in found.items() if id_ is None} - {UNCONDITION}  # never in a prompt
        wrong = [token for token in expected if found[token] != expected[token] and token not in harmless]
        if wrong:
            listed = ", ".join(f"{token} as {expected[token]}, found {found[token]}" for token in wrong)
            raise WeightsError(f"{path}: expected {listed}: the tokenizer belongs to another model")


@dataclass(frozen=True)
class Frame:
    """Tokens around the image's, and the places of all of them after the prompt.

    Args:
        height: H, rows of the token grid.
        width: W, tokens in a row.
    """

    height: int
    width: int

    def ids(self, special: SpecialTokens) -> Tensor:
        """Ids (H + 4,): answer_start, boi, the newlines, eoi, answer_end."""
        newlines = [special.newline] * self.height
        return torch.tensor([special.answer_start, special.boi, *newlines, special.eoi, special.answer_end])

    def row_offsets(self) -> Tensor:
        """Places (H·W + H + 4,), counted from the prompt's end, of the image's tokens, then of :meth:`ids`.

        >>> Frame(height=2, width=2).row_offsets().tolist()
        [2, 3, 5, 6, 0, 1, 4, 7, 8, 9]
        """
        grid = 2 + torch.arange(self.height * (self.width + 1)).view(self.height, -1)  # a newline ends each row
        end = 2 + grid.numel()
        return torch.cat([grid[:, :-1].flatten(), torch.tensor([0, 1]), grid[:, -1], torch.tensor([end, end + 1])])
