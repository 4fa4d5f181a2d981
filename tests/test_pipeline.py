"""From a prompt to a picture in Python."""

from __future__ import annotations

import importlib
import inspect
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torchvision.transforms.functional import pil_to_tensor

import lit_shortcut
from lit_shortcut import Pipeline, Shortcut, load
from lit_shortcut.acceleration.accelerated import Accelerated, Vanilla
from lit_shortcut.acceleration.origin import BaseReference
from lit_shortcut.acceleration.plans import Even
from lit_shortcut.bases.dimoo.adapter import DiMOO
from lit_shortcut.bases.maskgit.adapter import MaskGIT
from lit_shortcut.contracts import Conditions
from lit_shortcut.networks.shortcut import ShortcutNet
from lit_shortcut.pictures import conditions_of
from lit_shortcut.pipeline import BASES
from lit_shortcut.sampling import Decoding, LogProbs, generate
from lit_shortcut.weights import WeightsError
from tests.command_line import CONFIGS

CHECKPOINTS = CONFIGS.parent / "checkpoints"
DECODING = Decoding(num_steps=5)


@pytest.fixture(scope="module")
def fashion_text() -> Pipeline:
    return load(CHECKPOINTS / "fashion_text", budget=3)


SHIPPED = json.loads((CHECKPOINTS / "fashion/shortcut/config.json").read_text())["base"]["fingerprint"]


@pytest.fixture
def pipe(base: MaskGIT) -> Pipeline:
    torch.manual_seed(0)
    network = ShortcutNet(width=base.spec.width, num_heads=2)
    torch.nn.init.normal_(network.widen.weight, std=0.1)
    return Pipeline(base, DECODING, Shortcut(network), budget=2)


def test_import_is_light_and_every_public_name_is_there() -> None:
    code = "import sys, lit_shortcut; assert 'torch' not in sys.modules; print(lit_shortcut.__all__)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == str(lit_shortcut.__all__)
    for name in lit_shortcut.__all__:
        assert callable(getattr(lit_shortcut, name))
        assert name in dir(lit_shortcut)
    with pytest.raises(AttributeError, match="no attribute 'sample'"):
        _ = lit_shortcut.sample  # type: ignore[attr-defined]


def test_three_lines_draw_a_picture(fashion_text: Pipeline) -> None:
    pictures = fashion_text(["a dark, wide coat"], seeds=[1])
    (image,) = pictures.images
    assert image.size == (28, 28)
    assert pictures.full_steps.tolist() == [3]
    assert pictures.tokens.shape == (1, 196)
    assert pictures.latency_ms > 0
    assert pictures.log_probs is None
    again = fashion_text("a dark, wide coat", seeds=1)
    assert torch.equal(pil_to_tensor(again.images[0]), pil_to_tensor(image))


def test_pipeline_draws_what_the_loop_draws(pipe: Pipeline, base: MaskGIT) -> None:
    pictures = pipe(labels=[0, 3], seeds=[5, -7], log_probs=True)
    conditions = Conditions(torch.arange(2), torch.tensor([5, -7]), torch.tensor([0, 3]))
    assert isinstance(pipe.shortcut, Shortcut)
    log_probs = LogProbs()
    expected = generate(base, conditions, DECODING, Accelerated(Even(2), pipe.shortcut), on_step=log_probs)
    assert torch.equal(pictures.tokens, expected.tokens)
    assert torch.equal(pictures.full_steps, expected.full_steps)
    assert pictures.log_probs is not None
    assert torch.equal(pictures.log_probs, log_probs.gathered())
    images = torch.stack([pil_to_tensor(image) for image in pictures.images])
    assert torch.equal(images, base.decode(expected.tokens))


def test_full_budget_is_vanilla(pipe: Pipeline, base: MaskGIT) -> None:
    conditions = Conditions(torch.arange(2), torch.arange(2), torch.tensor([4, 1]))
    for num_steps in (5, 7):
        expected = generate(base, conditions, DECODING.at(num_steps), Vanilla()).tokens
        assert torch.equal(pipe(labels=[4, 1], budget=num_steps, num_steps=num_steps).tokens, expected)


def test_an_image_depends_on_neither_batch_size_nor_its_neighbours(pipe: Pipeline) -> None:
    together = pipe(labels=[0, 1, 2, 3, 4], seeds=range(10, 15))
    apart = pipe(labels=[0, 1, 2, 3, 4], seeds=range(10, 15), batch_size=2)
    assert torch.equal(together.tokens, apart.tokens)
    assert torch.equal(pipe(labels=3, seeds=13).tokens[0], together.tokens[3])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({}, "neither"),
        ({"prompts": "a cat", "labels": 1}, "both"),
        ({"prompts": "a cat"}, "labels in 0..4"),
        ({"labels": [5]}, "5"),
        ({"labels": [1, 2], "seeds": [1]}, "a seed for each of 2"),
        ({"labels": [1], "seeds": [2**63]}, "64 bits"),
        ({"labels": [1], "budget": 6}, "1..5"),
        ({"labels": [1], "batch_size": 0}, "batch_size"),
    ],
)
def test_bad_request_is_refused(pipe: Pipeline, arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        pipe(**arguments)


@pytest.mark.parametrize("label", [-1, 5])
def test_class_is_checked_before_it_goes_to_a_device(base: MaskGIT, label: int) -> None:
    with pytest.raises(ValueError, match=rf"class labels must lie in 0\.\.4; got \[{label}\]"):
        conditions_of(base, (), [0, label], [1, 2], device="meta")


@pytest.mark.parametrize("prompts", [[""], ["a cat", " "]])
def test_empty_prompt_is_refused(dimoo: DiMOO, prompts: list[str]) -> None:
    with pytest.raises(ValueError, match="an empty one"):
        Pipeline(dimoo, DECODING)(prompts)


def test_labels_are_refused_by_a_base_of_prompts(dimoo: DiMOO) -> None:
    with pytest.raises(ValueError, match="takes prompts, got labels"):
        Pipeline(dimoo, DECODING)(labels=[1])


def test_budget_without_a_shortcut_is_refused(base: MaskGIT) -> None:
    with pytest.raises(ValueError, match="needs a shortcut"):
        Pipeline(base, DECODING, budget=2)


@pytest.mark.parametrize("name", ["maskgit", "halton", "dimoo", "mmada", "amused", "meissonic"])
def test_exported_shortcut_names_the_base_that_its_trajectories_came_from(name: str) -> None:
    callbacks = yaml.safe_load((CONFIGS / name / "fit.yaml").read_text())["trainer"]["callbacks"]
    (export,) = (one["init_args"] for one in callbacks if one["class_path"].endswith("ExportShortcut"))
    recorded = yaml.safe_load((CONFIGS / "parts" / f"{name}_base.yaml").read_text())
    reference = BaseReference(**export["base"])
    module, _, function = BASES[reference.name].partition(":")
    built = inspect.signature(getattr(importlib.import_module(module), function)).bind(
        reference.source, **reference.arguments
    )
    assert recorded["class_path"] == f"{module}.{function}"
    assert built.arguments == recorded["init_args"]


def test_embedded_bases_are_those_of_the_shortcuts_own_budget() -> None:
    assert load(CHECKPOINTS / "fashion")(labels=[0, 1]).full_steps.tolist() == [3, 3]


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of the shipped class-conditional base with its shortcut."""
    shutil.copytree(CHECKPOINTS / "fashion", tmp_path / "fashion")
    return tmp_path / "fashion"


def reword(folder: Path, **changes: Any) -> None:
    path = folder / "shortcut" / "config.json"
    content = json.loads(path.read_text())
    content["base"] |= changes.pop("base", {})
    path.write_text(json.dumps(content | changes))


def test_shortcut_of_another_base_is_refused_by_fingerprint(copied: Path, base: MaskGIT) -> None:
    with pytest.raises(WeightsError, match=rf"{SHIPPED}.*{base.fingerprint}"):
        load(copied, base=base)
    reword(copied, base={"fingerprint": "0" * 16, "revision": "v2"})
    with pytest.raises(WeightsError, match=rf"0{{16}} \(revision v2\).*{SHIPPED}"):
        load(copied)


def test_shortcut_of_another_number_of_steps_is_refused(copied: Path) -> None:
    with pytest.raises(WeightsError, match=r"num_steps 16.*one of 8"):
        load(copied, budget=3, num_steps=8)
    with pytest.raises(ValueError, match=r"num_steps.*got 0"):
        load(copied, num_steps=0)
    assert load(copied, budget=8, num_steps=8)(labels=[0]).full_steps.tolist() == [8]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"base": {"name": "os"}}, "base is 'os', expected one of fashion"),
        ({"base": {"name": ""}}, "names no base"),
        ({"base": {"source": "../nowhere"}}, "nowhere"),
        ({"base": {"arguments": {"size": 3}}}, "base.arguments of fashion"),
        ({"base": {"module": "os"}}, "base.module is unknown"),
        ({"decoding": {"temp": 1}}, "decoding"),
        ({"num_steps": "8"}, "num_steps must be of type int"),
        ({"network": {"class": "Popen", "hparams": {}}}, "Popen"),
        ({"network": "ShortcutNet"}, "network"),
        ({"format_version": 2}, "format_version 1"),
        ({"plan": "odd"}, "no plan is named 'odd'"),
    ],
)
def test_bad_configuration_is_named(copied: Path, changes: dict[str, Any], named: str) -> None:
    reword(copied, **changes)
    with pytest.raises(ValueError, match=named):
        load(copied)


@pytest.mark.parametrize("source", ["nowhere", "/nowhere/at/all", "./nowhere"])
def test_address_of_nothing_is_named(source: str) -> None:
    with pytest.raises(WeightsError, match=source):
        load(source)
