from __future__ import annotations

from pathlib import Path

import jsonargparse
import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor, nn
from torch.multiprocessing.spawn import start_processes
from torchmetrics.image.fid import FrechetInceptionDistance

from lit_shortcut.fashion.classifier import FashionCNN, FashionFeatures
from lit_shortcut.metrics.images import ClassAgreement, FrechetDistance, ImageMetric
from lit_shortcut.weights import WeightsError, load_tensors, save_module, save_tensors
from tests.metrics.asked import asked
from tests.metrics.reference import write_reference

WIDTH = 6


class Projection(nn.Module):
    """A fixed random projection of the pixels of 4×4 images."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.num_features = WIDTH
        self.register_buffer("matrix", torch.randn(48, WIDTH, generator=torch.Generator().manual_seed(seed)) / 48)

    def forward(self, images: Tensor) -> Tensor:
        return images.expand(-1, 3, -1, -1).flatten(1).float() @ self.get_buffer("matrix")


class ReadsLabel(nn.Module):
    """Takes an image for the class its first pixel names."""

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.one_hot(images[:, 0, 0, 0].long(), 10).float()


def random_images(count: int, seed: int, high: int = 256) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, high, (count, 3, 4, 4), dtype=torch.uint8, generator=generator)


REAL, GENERATED, LABELS = random_images(50, seed=1), random_images(20, seed=2, high=9), torch.arange(20) % 9


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    path = tmp_path / "reference.safetensors"
    write_reference(path, Projection(), REAL.chunk(4), "random pixels")
    return path


@pytest.fixture
def metric(reference: Path) -> FrechetDistance:
    return FrechetDistance(Projection(), reference)


def measured(metric: ImageMetric, images: Tensor, batches: int = 3) -> float:
    for batch in images.chunk(batches):
        metric.update(batch, asked(torch.zeros(len(batch))))
    return float(metric.compute())


def test_reference_holds_mean_and_covariance(reference: Path) -> None:
    features = Projection()(REAL).double().numpy()
    tensors, metadata = load_tensors(reference)
    # features are float32, and a matrix product rounds otherwise in batches of another size
    np.testing.assert_allclose(tensors["mean"].numpy(), features.mean(0), rtol=1e-5)
    np.testing.assert_allclose(tensors["covariance"].numpy(), np.cov(features, rowvar=False), rtol=1e-5, atol=1e-4)
    assert (metadata["num_images"], metadata["images"]) == (50, "random pixels")


def test_distance_equals_its_definition(metric: FrechetDistance) -> None:
    real, generated = (Projection()(images).double().numpy() for images in (REAL, GENERATED))
    covariances = np.cov(real, rowvar=False), np.cov(generated, rowvar=False)
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = np.square(real.mean(0) - generated.mean(0)).sum() + np.trace(sum(covariances) - 2 * root)
    assert measured(metric, GENERATED) == pytest.approx(expected, rel=1e-5)


def test_preset_reference_equals_feeding_real_images(metric: FrechetDistance) -> None:
    theirs = FrechetInceptionDistance(feature=Projection(), normalize=False, antialias=False)
    theirs.update(REAL, real=True)
    theirs.update(GENERATED, real=False)
    assert measured(metric, GENERATED) == pytest.approx(float(theirs.compute()), rel=1e-5)


def test_distance_to_its_own_statistics_is_zero(metric: FrechetDistance) -> None:
    assert measured(metric, REAL) == pytest.approx(0, abs=1e-5)


def test_order_and_batches_of_images_do_not_matter(metric: FrechetDistance) -> None:
    first = measured(metric, GENERATED)
    metric.reset()
    assert measured(metric, GENERATED.flip(0), batches=7) == pytest.approx(first, rel=1e-5)


def test_reference_survives_reset_and_images_do_not(metric: FrechetDistance) -> None:
    first = measured(metric, GENERATED)
    metric.reset()
    assert measured(metric, REAL) != pytest.approx(first, rel=1e-2)
    metric.reset()
    assert measured(metric, GENERATED) == first


def test_reset_under_inference_mode_does_not_forbid_later_updates(metric: FrechetDistance) -> None:
    first = measured(metric, GENERATED)
    with torch.inference_mode():
        metric.reset()
    assert measured(metric, GENERATED) == first


def test_trainers_precision_does_not_reach_the_features(metric: FrechetDistance) -> None:
    first = measured(metric, GENERATED)
    metric.reset()
    with torch.autocast("cpu", torch.bfloat16):
        assert measured(metric, GENERATED) == first


def test_a_single_image_is_refused(metric: FrechetDistance, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 images or more, got 1"):
        measured(metric, GENERATED[:1])
    with pytest.raises(ValueError, match="2 images or more, got 1"):
        write_reference(tmp_path / "none.safetensors", Projection(), [REAL[:1]], "one")


def test_reference_of_another_extractor_is_refused(reference: Path) -> None:
    with pytest.raises(WeightsError, match=r"reference\.safetensors.*expected statistics of extractor"):
        FrechetDistance(Projection(seed=1), reference)


def test_reference_of_other_features_of_the_same_weights_is_refused(reference: Path) -> None:
    extractor = Projection()
    extractor.num_features = WIDTH + 1
    with pytest.raises(WeightsError, match=r"reference\.safetensors.*with 7 features"):
        FrechetDistance(extractor, reference)


def test_file_without_statistics_is_refused(tmp_path: Path) -> None:
    save_tensors(tmp_path / "other.safetensors", {"weight": torch.zeros(1)}, {})
    with pytest.raises(WeightsError, match=r"other\.safetensors"):
        FrechetDistance(Projection(), tmp_path / "other.safetensors")
    with pytest.raises(
        WeightsError, match=r"missing\.safetensors: no such file of reference statistics; `lightning predict` with"
    ):
        FrechetDistance(Projection(), tmp_path / "missing.safetensors")


def test_agreement_is_the_share_of_images_taken_for_their_class() -> None:
    metric = ClassAgreement(ReadsLabel())
    images = torch.arange(8, dtype=torch.uint8).view(8, 1, 1, 1).expand(-1, 3, 4, 4)
    metric.update(images[:2], asked(torch.tensor([0, 1])))
    metric.update(images[2:], asked(torch.tensor([2, 0, 0, 0, 0, 7])))
    assert metric.compute() == 0.5
    metric.reset()
    metric.update(images[:1], asked(torch.tensor([5])))
    assert metric.compute() == 0


@pytest.mark.parametrize("split", [13, 20])
@pytest.mark.filterwarnings("ignore:The ``compute`` method")  # of the rank that has no images when all 20 go to one
def test_two_processes_measure_what_one_does(metric: FrechetDistance, tmp_path: Path, split: int) -> None:
    agreement = ClassAgreement(ReadsLabel())
    agreement.update(GENERATED, asked(LABELS))
    expected = [measured(metric, GENERATED)]
    metric.reset()
    expected += [measured(metric, GENERATED[:18]), float(agreement.compute())]
    arguments = (metric, agreement, split, tmp_path)
    start_processes(_measure_share, arguments, nprocs=2, start_method="fork")  # type: ignore[no-untyped-call]
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}.pt") == pytest.approx(expected, rel=1e-5)


def _measure_share(rank: int, metric: FrechetDistance, agreement: ClassAgreement, split: int, folder: Path) -> None:
    torch.set_num_threads(1)  # GNU OpenMP does not survive a fork
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    own = slice(0, split) if rank == 0 else slice(split, None)
    results = []
    for count in (20, 18):
        metric.reset()
        if len(GENERATED[:count][own]):
            metric.update(GENERATED[:count][own], asked(LABELS[:count][own]))
        results.append(float(metric.compute()))
    agreement.reset()
    if len(GENERATED[own]):
        agreement.update(GENERATED[own], asked(LABELS[own]))
    torch.save([*results, float(agreement.compute())], folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_metrics_are_built_from_yaml(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_module(tmp_path / "classifier.safetensors", FashionCNN(width=4))
    extractor = FashionFeatures.load(tmp_path / "classifier.safetensors")
    images = torch.randint(0, 256, (6, 1, 8, 8), dtype=torch.uint8)
    write_reference(tmp_path / "reference.safetensors", extractor, [images], "random pixels")
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--metrics", type=dict[str, ImageMetric])
    classifier = {"init_args": {"path": str(tmp_path / "classifier.safetensors")}}
    features = {"class_path": "lit_shortcut.fashion.classifier.FashionFeatures.load"} | classifier
    network = {"class_path": "lit_shortcut.fashion.classifier.FashionCNN.load"} | classifier
    config = parser.parse_object(
        {
            "metrics": {
                "fid_fashion_cnn": {
                    "class_path": "lit_shortcut.metrics.images.FrechetDistance",
                    "init_args": {"extractor": features, "reference": str(tmp_path / "reference.safetensors")},
                },
                "agreement": {
                    "class_path": "lit_shortcut.metrics.images.ClassAgreement",
                    "init_args": {"classifier": network},
                },
            }
        }
    )
    metrics: dict[str, ImageMetric] = parser.instantiate(config).metrics
    labels = extractor.classifier(images).argmax(-1)
    for metric in metrics.values():
        metric.to(torch.device("cpu"))
        metric.update(images.expand(-1, 3, -1, -1), asked(labels))
    assert metrics["fid_fashion_cnn"].compute() == pytest.approx(0, abs=1e-5)
    assert metrics["agreement"].compute() == 1
