"""What MkDocs is told beyond mkdocs.yml: pages and images from outside docs/, the notebook, and roles in docstrings."""

from __future__ import annotations

import re
from pathlib import Path

import griffe
import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from nbclient import NotebookClient
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[1]
OUTSIDE = ["CONTRIBUTING.md", *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("checkpoints/*/report/*.*"))]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files outside docs/ that pages refer to, so that links work here and in the repository alike."""
    for name in OUTSIDE:
        if name.endswith("report.md"):  # its text is on the page of results
            continue
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    for name, content in _executed_notebook().items():
        files.append(File.generated(config, name, content=content))
    return files


def _executed_notebook() -> dict[str, str | bytes]:
    """Run docs/tutorial.ipynb; returns its page, notebook.md, and the pictures on it, by file name.

    Raises:
        nbclient.exceptions.CellExecutionError: if a cell fails.
    """
    notebook = nbformat.read(ROOT / "docs/tutorial.ipynb", as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(ROOT)}}).execute()
    text, resources = MarkdownExporter().from_notebook_node(
        notebook, {"unique_key": "notebook", "output_files_dir": "images"}
    )
    return {"notebook.md": text, **resources["outputs"]}


def on_page_markdown(markdown: str, **_: object) -> str:
    """Let links that lead out of docs/, or into it, lead to the same files of the site."""
    return re.sub(r"\]\((?:(?:\.\./)+(?=CONTRIBUTING\.md|checkpoints/)|docs/)", "](/", markdown)


class Roles(griffe.Extension):
    """Show :class:`Name` and its like, which the docstrings use, as code."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        """Replace the roles of one docstring."""
        if obj.docstring:
            obj.docstring.value = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", obj.docstring.value)
