"""What MkDocs is told beyond mkdocs.yml: pages and images outside docs/, and roles in docstrings."""

from __future__ import annotations

import re
from pathlib import Path

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
OUTSIDE = ["CONTRIBUTING.md", *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("checkpoints/*/report/*.*"))]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files outside docs/ that pages refer to, so that links work here and in the repository alike."""
    for name in OUTSIDE:
        if name.endswith("report.md"):  # its text is on the page of results
            continue
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Let links that lead out of docs/, or into it, lead to the same files of the site."""
    return re.sub(r"\]\((?:(?:\.\./)+(?=CONTRIBUTING\.md|checkpoints/)|docs/)", "](/", markdown)


class Roles(griffe.Extension):
    """Show :class:`Name` and its like, which the docstrings use, as code."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        """Replace the roles of one docstring."""
        if obj.docstring:
            obj.docstring.value = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", obj.docstring.value)
