"""What README and docs show works as it is shown; their tables are those of the reports."""

from __future__ import annotations

import ast
import importlib
import json
import re
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
import yaml
from PIL import Image

from tests.command_line import lightning
from tests.pages import PAGES, ROOT, blocks, commands, links, marked, name, table

VERBS = {"fit", "validate", "test", "predict", "generate"}
OTHER_VERBS = {"verify", "card", "app"}  # they have no configuration to print
FOREIGN = {"cp", "hf", "mkdir", "source", "wandb"}
every_page = pytest.mark.parametrize("page", PAGES, ids=name)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to run a page's commands in, as if it were the repository's root."""
    for part in ("configs", "checkpoints", "benchmarks", "tests"):
        (tmp_path / part).symlink_to(ROOT / part)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def parse(folder: Path, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Parse a command of ours without running it."""
    verb, rest = words[1], words[2:]
    if verb in OTHER_VERBS:
        assert rest
        assert all((folder / word).is_file() for word in rest if word.endswith(".yaml"))
        return
    assert verb in VERBS
    with pytest.raises(SystemExit) as stopped:
        lightning(
            folder, verb, *rest, *([] if {"--print_config", "--help", "--model.help"} & {*rest} else ["--print_config"])
        )
    printed = capsys.readouterr()
    assert stopped.value.code == 0, f"{' '.join(words)}: {printed.err}"


@every_page
def test_commands_are_understood(page: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    titled = {block.title: block.text for block in blocks(page, "python", "yaml") if block.title}
    for title, text in titled.items():
        (folder / title).write_text(text)
    for words in commands(page):
        command = " ".join(words)
        match [Path(words[0]).name, *words[1:]]:
            case ["lit-shortcut" | "lightning", *rest] if rest:
                parse(folder, words, capsys)
            case ["make", *rest]:
                made = subprocess.run(["make", "-C", ROOT, "-n", *rest], capture_output=True, text=True, check=False)
                assert made.returncode == 0, f"{command}: {made.stderr}"
                configs = re.findall(r"\S+\.yaml", made.stdout)
                assert not [config for config in configs if not (ROOT / config).is_file()], command
            case ["pytest", *rest]:
                assert all((ROOT / word).exists() for word in rest if word.endswith(".py")), command
            case ["python", "-m", module, *_]:
                assert find_spec(module), command
            case ["python", script, *_]:
                assert script in titled or (ROOT / script).is_file(), command
            case ["pip", "wheel" | "install", *rest]:
                named = [
                    extra
                    for word in rest
                    for listed in re.findall(r"^\.\[(.*)\]$", word)
                    for extra in listed.split(",")
                ]
                assert set(named) <= extras.keys(), command
            case [program, *_]:
                assert program in FOREIGN, command
    for title in titled:
        sys.modules.pop(title.removesuffix(".py"), None)


@every_page
def test_yaml_names_what_exists(page: Path, folder: Path) -> None:
    titled = {block.title.removesuffix(".py") for block in blocks(page, "python") if block.title}

    def visit(value: Any) -> None:
        for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else []:
            visit(inner)
        if isinstance(value, dict) and "class_path" in value:
            module, _, last = value["class_path"].rpartition(".")
            if module in titled:
                return
            try:
                found = importlib.import_module(module)
            except ModuleNotFoundError:  # a function of a class
                module, _, owner = module.rpartition(".")
                found = getattr(importlib.import_module(module), owner)
            assert hasattr(found, last), value["class_path"]

    for block in blocks(page, "yaml"):
        visit(yaml.safe_load(block.text))


@every_page
def test_python_imports_what_exists(page: Path) -> None:
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block.text)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module or "")
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


def run_python(page: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run the first block of Python on ``page`` that makes no file; returns its names."""
    monkeypatch.chdir(ROOT)
    text = next(block.text for block in blocks(ROOT / page, "python") if not block.title)
    names: dict[str, Any] = {}
    exec(text, names)
    return names


@pytest.mark.parametrize(("page", "count"), [("README.md", 2), ("docs/tutorial.md", 3), ("docs/how-to/generate.md", 2)])
def test_python_of_the_first_pages_draws_pictures(page: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    names = run_python(page, monkeypatch)
    images: list[Image.Image] = names["images"] if "images" in names else names["pictures"].images
    assert len(images) == count
    assert all(image.size == (28, 28) and len(image.getcolors()) > 20 for image in images)


def test_plain_pytorch_draws_ten_garments(monkeypatch: pytest.MonkeyPatch) -> None:
    images = run_python("docs/how-to/own-base.md", monkeypatch)["images"]
    assert (images.shape, len(images.unique()) > 50) == ((10, 3, 28, 28), True)


def test_notebook_runs_top_to_bottom(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[int] = []
    monkeypatch.setattr(plt, "show", lambda: (shown.extend(plt.get_fignums()), plt.close("all")))
    cells = json.loads((ROOT / "docs/tutorial.ipynb").read_text())["cells"]
    names: dict[str, Any] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            assert not cell["outputs"], "outputs are made by make docs"
            exec("".join(cell["source"]).replace("count = 40", "count = 12"), names)
    assert len(shown) == 3
    assert len(names["cosines"]) == names["decoding"].num_steps - 1
    assert all(0.5 < cosine < 1 for cosine in names["cosines"])
    real, none = names["errors"].values()
    assert all(with_control < min(1, without) for with_control, without in zip(real, none, strict=True))


@every_page
def test_reports_are_quoted_whole(page: Path) -> None:
    for file, text in marked(page, "report"):
        assert text.strip() == file.read_text().strip(), file


@every_page
def test_rows_of_tables_are_rows_of_their_reports(page: Path) -> None:
    for file, text in marked(page, "table"):
        reported = table(file.read_text())
        for row in table(text):
            assert any(row.items() <= other.items() for other in reported), f"{row} is not in {file}"


def test_every_report_is_quoted() -> None:
    quoted = {file for page in PAGES for file, _ in marked(page, "report")}
    assert quoted == set(ROOT.glob("checkpoints/*/report/report.md"))


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    assert not [link for link in links(page) if not (page.parent / link).exists()]


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
    named = set(re.findall(r"[\w/-]+\.md", navigation)) - {"CONTRIBUTING.md", "notebook.md"}
    assert named == {page.relative_to(ROOT / "docs").as_posix() for page in ROOT.glob("docs/**/*.md")}
