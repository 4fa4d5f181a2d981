from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import huggingface_hub.errors
import jsonargparse
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.multiprocessing.spawn import start_processes
from transformers import CLIPModel, CLIPProcessor

from lit_shortcut import hub
from lit_shortcut.metrics.clip import CLIPScore
from lit_shortcut.metrics.images import ImageMetric
from lit_shortcut.weights import WeightsError
from tests.fashion.small_clip import write_clip
from tests.metrics.asked import asked

PROMPTS = ("a dark coat", "one bag", "größer", "a bright coat", "x", "of a photo", "a coat")
IMAGES = torch.randint(256, (7, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip") / "tiny", seed=2)


@pytest.fixture
def metric(folder: Path) -> CLIPScore:
    return CLIPScore(str(folder))


def measured(metric: ImageMetric, images: Tensor, prompts: tuple[str, ...]) -> float:
    """The measure of ``images``, taken in by batches of three."""
    for first in range(0, len(images), 3):
        rows = slice(first, first + 3)
        metric.update(images[rows], asked(torch.zeros(len(images[rows])), prompts[rows]))
    return float(metric.compute())


def reference(folder: Path, images: Tensor, prompts: tuple[str, ...]) -> Tensor:
    """100 · cosines (B,) from the logits of transformers' own forward pass."""
    model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    inputs = processor(text=list(prompts), images=list(images), return_tensors="pt", padding=True, truncation=True)
    with torch.no_grad():
        return 100 * model(**inputs).logits_per_image.diagonal() / model.logit_scale.exp()


def test_score_is_the_mean_of_what_the_models_own_logits_say(metric: CLIPScore, folder: Path) -> None:
    expected = reference(folder, IMAGES, PROMPTS)
    assert expected.mean() > 1
    assert expected.std() > 1
    assert measured(metric, IMAGES, PROMPTS) == pytest.approx(float(expected.mean()), rel=1e-4)


def test_order_and_batches_do_not_matter_and_pairs_do(metric: CLIPScore) -> None:
    first = measured(metric, IMAGES, PROMPTS)
    metric.reset()
    assert measured(metric, IMAGES.flip(0), PROMPTS[::-1]) == pytest.approx(first, rel=1e-4)
    metric.reset()
    assert measured(metric, IMAGES, PROMPTS[::-1]) != pytest.approx(first, rel=1e-2)


def test_reset_forgets_the_images_even_under_inference_mode(metric: CLIPScore) -> None:
    first = measured(metric, IMAGES, PROMPTS)
    with torch.inference_mode():
        metric.reset()
    assert measured(metric, IMAGES, PROMPTS) == first


def test_trainers_precision_does_not_reach_the_features(metric: CLIPScore) -> None:
    first = measured(metric, IMAGES, PROMPTS)
    metric.reset()
    with torch.autocast("cpu", torch.bfloat16):
        assert measured(metric, IMAGES, PROMPTS) == first


def test_no_parameter_of_the_clip_is_trained_or_dropped_out(metric: CLIPScore) -> None:
    assert not any(parameter.requires_grad for parameter in metric.clip.module.parameters())
    assert not metric.clip.module.training


def test_long_prompts_are_cut_before_their_end_token_and_this_is_said(metric: CLIPScore, folder: Path) -> None:
    long = ("dark " * 20, "a coat")
    with pytest.warns(UserWarning, match="longer than this CLIP's context of 16 tokens are cut"):
        score = measured(metric, IMAGES[:2], long)
    assert score == pytest.approx(float(reference(folder, IMAGES[:2], long).mean()), rel=1e-4)
    metric.reset()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert measured(metric, IMAGES[:2], ("dark", "a coat")) != pytest.approx(score, rel=1e-3)
    assert not [warning for warning in said if "context" in str(warning.message)]


def test_images_without_prompts_are_refused(metric: CLIPScore) -> None:
    with pytest.raises(ValueError, match=r"a prompt for each of 7 .* got 0"):
        metric.update(IMAGES, asked(torch.zeros(7)))


def test_two_processes_measure_what_one_does(metric: CLIPScore, tmp_path: Path) -> None:
    expected = measured(metric, IMAGES, PROMPTS)
    start_processes(_measure_share, (metric, tmp_path), nprocs=2, start_method="fork")  # type: ignore[no-untyped-call]
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}.pt") == pytest.approx(expected, rel=1e-4)


def _measure_share(rank: int, metric: CLIPScore, folder: Path) -> None:
    torch.set_num_threads(1)  # GNU OpenMP does not survive a fork
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    own = slice(0, 4) if rank == 0 else slice(4, None)
    metric.reset()
    torch.save(measured(metric, IMAGES[own], PROMPTS[own]), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_metric_is_built_from_yaml(folder: Path) -> None:
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--metrics", type=dict[str, ImageMetric])
    spec = {"class_path": "lit_shortcut.metrics.clip.CLIPScore", "init_args": {"model": str(folder)}}
    metrics: dict[str, ImageMetric] = parser.instantiate(parser.parse_object({"metrics": {"clip": spec}})).metrics
    metrics["clip"].to(torch.device("cpu"))
    assert measured(metrics["clip"], IMAGES, PROMPTS) > 1


def test_a_name_on_the_hub_is_looked_up_in_its_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked_for = []

    def snapshot(repository: str, **settings: object) -> str:
        asked_for.append(repository)
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    assert measured(CLIPScore("hf://openai/clip-vit-base-patch16"), IMAGES, PROMPTS) > 1
    assert asked_for == ["openai/clip-vit-base-patch16"]


def test_without_network_it_is_said_what_to_download(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **settings: object) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("offline")

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(WeightsError, match=r"hf download openai/clip-vit-base-patch16 .*model\.safetensors.*FOLDER"):
        CLIPScore("hf://openai/clip-vit-base-patch16")


def test_a_folder_that_is_not_there_is_told_from_a_name_on_the_hub() -> None:
    with pytest.raises(
        WeightsError, match=r"openai/clip: no such folder; .* such as hf://openai/clip-vit-base-patch16"
    ):
        CLIPScore("openai/clip")


def test_without_the_package_it_is_said_how_to_get_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lit-shortcut\[text\]'"):
        CLIPScore(str(folder))


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_incomplete_folder_is_refused_by_name(file: str, tmp_path: Path) -> None:
    (write_clip(tmp_path / "part") / file).unlink()
    with pytest.raises(WeightsError, match=r"part: .* CLIPModel with tokenizer and image processor"):
        CLIPScore(str(tmp_path / "part"))


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    weights = write_clip(tmp_path / "other") / "model.safetensors"
    tensors = load_file(weights)
    save_file({name: tensors[name] for name in tensors if "logit_scale" not in name}, weights, {"format": "pt"})
    with pytest.raises(WeightsError, match=r"other: .* CLIPModel; .* logit_scale"):
        CLIPScore(str(tmp_path / "other"))


def test_config_that_is_no_json_is_refused(tmp_path: Path) -> None:
    (write_clip(tmp_path / "bad") / "config.json").write_text("{")
    with pytest.raises(WeightsError, match=r"bad: .* CLIPModel"):
        CLIPScore(str(tmp_path / "bad"))


def test_saved_clip_names_its_sizes(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["vision_config"]["image_size"]) == ("clip", 8)
    assert config["text_config"]["eos_token_id"] == 3
