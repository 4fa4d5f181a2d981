"""An installation without the repository: from an empty folder, the embedded defaults run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("lit_shortcut", "datamodules", "configs", "checkpoints")
RUN = """
import sys
from lit_shortcut.cli import main
for words in {commands}:
    sys.argv[1:] = words.split()
    main()
from lit_shortcut import load
print(load("runs/fashion/shortcut", budget=2)(labels=[0]).full_steps.tolist())
"""
QUICK = "--trainer.accelerator=cpu --trainer.enable_progress_bar=false"
EXPORT = (
    "--trainer.callbacks=lit_shortcut.callbacks.export.ExportShortcut --trainer.callbacks.path=runs/fashion/shortcut "
    "--trainer.callbacks.licence=Apache-2.0 --trainer.callbacks.trained_on=nothing "
    "--trainer.callbacks.base.name=fashion --trainer.callbacks.base.source=../../../checkpoints/fashion"
)
COMMANDS = [
    f"predict --config configs/fashion/extract.yaml {QUICK} --data.num_images=8 --data.batch_size=2",
    f"fit --config configs/fashion/fit.yaml {QUICK} {EXPORT} --trainer.logger=false --trainer.max_steps=2 "
    "--trainer.enable_checkpointing=false "
    "--trainer.val_check_interval=2 --data.batch_size=8",
    f"test --config configs/fashion/evaluate.yaml {QUICK} --trainer.logger=false --trainer.callbacks=[] "
    "--data.num_images=4 --data.batch_size=4 --model.latency_rounds=0 --model.rows=[[16],[16,2,shortcut]] "
    "--model.metrics=null",
    f"generate --config configs/fashion_text/generate.yaml {QUICK} --prompt coat",
]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a wheel of the project puts into a folder of packages."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in FOLDERS:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", folder]
    subprocess.run([sys.executable, "-m", "pip", "wheel", source, *options], check=True, timeout=200)
    (wheel,) = folder.glob("*.whl")
    with ZipFile(wheel) as archive:
        archive.extractall(folder / "packages")
    return folder / "packages"


def test_wheel_has_all_that_the_repository_ships(installed: Path) -> None:
    for name in ("configs", "checkpoints"):
        shipped = {path.relative_to(ROOT): path.read_bytes() for path in (ROOT / name).rglob("*") if path.is_file()}
        inside = installed / "lit_shortcut/shipped"
        assert shipped == {
            path.relative_to(inside): path.read_bytes() for path in (inside / name).rglob("*") if path.is_file()
        }
    assert (installed / "lit_shortcut/report/page.html").is_file()
    assert {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")} == {
        "datamodules",
        "lit_shortcut",
    }


def test_installed_package_records_fits_tests_and_generates_from_an_empty_folder(
    installed: Path, tmp_path: Path
) -> None:
    environment = os.environ | {"PYTHONPATH": str(installed), "WANDB_MODE": "disabled"}
    command = [sys.executable, "-c", RUN.format(commands=COMMANDS)]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, check=False, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.splitlines()[-1] == "[2]"
    assert f"checkpoints/fashion/base.safetensors: taken from {installed / 'lit_shortcut/shipped'}" in done.stderr
    runs = tmp_path / "runs"
    for path in ("fashion/trajectories/shard-000003.tar", "fashion/shortcut/model.safetensors"):
        assert (runs / path).is_file()
    assert (runs / "fashion/report/rows/shortcut_n16_b2_seed10.json").is_file()
    assert (runs / "fashion_text/pictures/000000.png").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}
