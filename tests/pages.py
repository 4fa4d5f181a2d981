"""What the pages of the documentation hold: blocks of code, commands, tables between markers, links."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]
_FENCE = re.compile(r"^( *)```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
_COMMANDS = ("lit-shortcut ", "lightning ", "make ", "pytest ", "python -m ", "pip install ")


class Block(NamedTuple):
    """A fenced block; ``title`` is the name of the file that the page has the reader make of it, if any."""

    language: str
    title: str
    text: str


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, *languages: str) -> list[Block]:
    found = []
    for indent, language, title, text in _FENCE.findall(page.read_text()):
        if language in languages:
            found.append(Block(language, title, re.sub(f"^{indent}", "", text, flags=re.MULTILINE)))
    return found


def commands(page: Path) -> list[list[str]]:
    """The words of every command on ``page``, in blocks of sh and in the running text, without their environment."""
    lines = [line for block in blocks(page, "sh") for line in block.text.replace("\\\n", " ").splitlines()]
    spans = re.findall(r"`([^`\n]+)`", _FENCE.sub("", page.read_text()))
    lines += [span for span in spans if span.startswith(_COMMANDS)]
    found = []
    for line in lines:
        words = shlex.split(line, comments=True)
        while words and (words[0] == "srun" or re.fullmatch(r"[A-Z_]+=\S*", words[0])):
            words = words[1:]
        if words:
            found.append(words)
    return found


def marked(page: Path, kind: str) -> list[tuple[Path, str]]:
    """File and text of each ``<!-- kind: file -->`` … ``<!-- /kind -->`` on ``page``."""
    pattern = rf"<!-- {kind}: (\S+) -->\n(.*?)\n<!-- /{kind} -->"
    return [(ROOT / file, text) for file, text in re.findall(pattern, page.read_text(), flags=re.DOTALL)]


def table(text: str) -> list[dict[str, str]]:
    """Rows of the first Markdown table in ``text``, by their headings."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return [dict(zip(lines[0], cells, strict=True)) for cells in lines[2:]]


def links(page: Path) -> list[str]:
    """Paths that ``page`` links to, without those of the web."""
    found = re.findall(r"\]\(([^)\s]+)\)", _FENCE.sub("", page.read_text()))
    return [link.partition("#")[0] for link in found if not link.startswith(("http", "#"))]
