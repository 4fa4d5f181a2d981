from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
import torch_fidelity
from torch import Tensor, nn
from torch.multiprocessing.spawn import start_processes
from torchmetrics.image.fid import FrechetInceptionDistance

from lit_shortcut.metrics.distances import FrechetDistance, InceptionScore, KernelDistance, Precision, Recall
from lit_shortcut.metrics.images import ClassAgreement, ImageMetric, collection
from lit_shortcut.weights import WeightsError, load_tensors, save_tensors
from tests.metrics.asked import asked
from tests.metrics.reference import Images, write_reference

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
    write_reference(path, Projection(), REAL.chunk(4), "random pixels", num_features=40)
    return path


@pytest.fixture
def metric(reference: Path) -> FrechetDistance:
    return FrechetDistance(Projection(), reference)


@pytest.mark.parametrize("kind", [FrechetDistance, partial(KernelDistance, subset_size=20), Precision, Recall])
def test_values_have_the_precision_of_float32_in_a_trainer_of_bfloat16(
    kind: Callable[..., ImageMetric], reference: Path
) -> None:
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        metric = kind(Projection(), reference)
        torch.set_default_dtype(dtype)  # Lightning's bf16-true does so around each step
        try:
            metric.update(GENERATED, asked(LABELS))
            found.append(metric.compute())
        finally:
            torch.set_default_dtype(torch.float32)
    assert torch.equal(*found)


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
    with pytest.raises(WeightsError, match=r"missing\.safetensors: no such file .* `lit-shortcut predict` with"):
        FrechetDistance(Projection(), tmp_path / "missing.safetensors")


@pytest.mark.parametrize("split", [13, 20])
@pytest.mark.filterwarnings("ignore:The ``compute`` method")  # of the rank that has no images when all 20 go to one
def test_two_processes_measure_what_one_does(reference: Path, tmp_path: Path, split: int) -> None:
    metrics: list[ImageMetric] = [
        FrechetDistance(Projection(), reference),
        KernelDistance(Projection(), reference, subsets=4, subset_size=9),
        Recall(Projection(), reference),
        InceptionScore(Projection(), splits=3),
        ClassAgreement(ReadsLabel()),
    ]
    expected = []
    for count in (20, 18):
        for metric in metrics:
            metric.reset()
            metric.update(GENERATED[:count], asked(LABELS[:count]))
            expected.append(float(metric.compute()))
    arguments = (metrics, split, tmp_path)
    start_processes(_measure_share, arguments, nprocs=2, start_method="fork")  # type: ignore[no-untyped-call]
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}.pt") == pytest.approx(expected, rel=1e-5)


def _measure_share(rank: int, metrics: list[ImageMetric], split: int, folder: Path) -> None:
    torch.set_num_threads(1)  # GNU OpenMP does not survive a fork
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    results = []
    for count in (20, 18):
        own = torch.arange(count) < split if rank == 0 else torch.arange(count) >= split
        for metric in metrics:
            metric.reset()
            if bool(own.any()):
                every = asked(LABELS[:count])
                metric.update(GENERATED[:count][own], every._replace(ids=every.ids[own], labels=every.labels[own]))
            results.append(float(metric.compute()))
    torch.save(results, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


# ---- against torch-fidelity


class Theirs(torch_fidelity.FeatureExtractorBase):  # type: ignore[misc]
    """:class:`Projection` as torch-fidelity takes it."""

    def __init__(self, name: str, features_list: list[str], **_: object) -> None:
        super().__init__(name, features_list)
        self.projection = Projection()

    @staticmethod
    def get_provided_features_list() -> tuple[str]:
        return ("all",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "all"

    def forward(self, images: Tensor) -> tuple[Tensor]:
        return (self.projection(images),)


def test_values_equal_torch_fidelitys(tmp_path: Path) -> None:
    real, generated = random_images(300, seed=1), random_images(280, seed=2, high=240)
    torch_fidelity.register_feature_extractor("projection", Theirs)
    theirs = torch_fidelity.calculate_metrics(
        input1=Images(generated),
        input2=Images(real),
        fid=True,
        kid=True,
        prc=True,
        isc=True,
        kid_subset_size=100,
        feature_extractor="projection",
        cuda=False,
        cache=False,
        save_cpu_ram=True,  # no worker processes
        verbose=False,
    )
    path = tmp_path / "reference.safetensors"
    write_reference(path, Projection(), [real], "random pixels", num_features=300)
    # torch-fidelity takes the real images in their order, the file in that of their draws
    tensors, metadata = load_tensors(path)
    save_tensors(path, tensors | {"features": Projection()(real)}, metadata)
    ours: dict[str, ImageMetric] = {
        "frechet_inception_distance": FrechetDistance(Projection(), path),
        "kernel_inception_distance_mean": KernelDistance(Projection(), path, subset_size=100),
        "precision": Precision(Projection(), path),
        "recall": Recall(Projection(), path),
        "inception_score_mean": InceptionScore(Projection()),
    }
    for name, metric in ours.items():
        metric.update(generated[:100], asked(torch.zeros(280))._replace(ids=torch.arange(100)))
        metric.update(generated[100:], asked(torch.zeros(280))._replace(ids=torch.arange(100, 280)))
        assert float(metric.compute()) == pytest.approx(theirs[name], rel=1e-4), name
    assert 0.05 < theirs["recall"] < theirs["precision"] < 1
    assert theirs["kernel_inception_distance_mean"] > 1e-3


def test_metrics_of_one_extractor_run_it_once(reference: Path) -> None:
    passes = []
    extractors = [Projection(), Projection(), Projection(seed=1)]
    for extractor in extractors:
        extractor.register_forward_hook(lambda *_: passes.append(1))
    first, second, other = extractors
    metrics = collection(
        {
            "fid": FrechetDistance(first, reference),
            "recall": Recall(second, reference),
            "score": InceptionScore(other, splits=2),
        }
    )
    metrics.update(GENERATED, asked(LABELS))
    assert len(passes) == 2
    alone = Recall(Projection(), reference)
    alone.update(GENERATED, asked(LABELS))
    assert metrics.compute()["recall"] == alone.compute()
    metrics.reset()
    metrics.update(REAL, asked(torch.zeros(50)))
    assert float(metrics.compute()["fid"]) == pytest.approx(0, abs=1e-5)


# ---- reference features


def test_kept_features_are_a_random_subset_whatever_the_batches(tmp_path: Path) -> None:
    for name, batches in (("whole", 1), ("split", 7)):
        write_reference(tmp_path / name, Projection(), REAL.chunk(batches), "random pixels", num_features=9)
    whole, split = (load_tensors(tmp_path / name)[0]["features"] for name in ("whole", "split"))
    torch.testing.assert_close(whole, split)
    rows = [int((Projection()(REAL) - row).abs().sum(1).argmin()) for row in whole]
    assert len(set(rows)) == 9
    assert sorted(rows) != rows[:9] != list(range(9))


def test_reference_without_features_serves_the_frechet_distance_only(tmp_path: Path) -> None:
    path = tmp_path / "moments.safetensors"
    write_reference(path, Projection(), [REAL], "random pixels")
    FrechetDistance(Projection(), path)
    for metric in (KernelDistance, Precision, Recall):
        with pytest.raises(WeightsError, match=r"moments\.safetensors.*features.*num_reference_features"):
            metric(Projection(), path)


def test_kernel_distance_of_few_images_takes_them_all(reference: Path) -> None:
    values = []
    for size in (20, 40):
        metric = KernelDistance(Projection(), reference, subset_size=size)
        metric.update(GENERATED, asked(LABELS))
        values.append(float(metric.compute()))
    assert len(GENERATED) == 20
    assert values[0] == values[1] > 0


def test_sizes_that_do_not_fit_are_refused(reference: Path) -> None:
    with pytest.raises(ValueError, match=r"subset_size.*40; got 41"):
        KernelDistance(Projection(), reference, subset_size=41)
    with pytest.raises(ValueError, match=r"neighbours.*39.*got 40"):
        Precision(Projection(), reference, neighbours=40)
    few: list[tuple[ImageMetric, str]] = [
        (Recall(Projection(), reference, neighbours=20), "neighbours.*19.*got 20"),
        (InceptionScore(Projection(), splits=21), "splits.*20; got 21"),
    ]
    for metric, message in few:
        metric.update(GENERATED, asked(LABELS))
        with pytest.raises(ValueError, match=message):
            metric.compute()


def test_identity_holds_all_that_a_value_depends_on(reference: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    write_reference(other, Projection(), [REAL[:45]], "random pixels", num_features=40)
    again = KernelDistance(Projection(), reference, subset_size=9).identity()
    assert again == KernelDistance(Projection(), reference, subset_size=9).identity()
    different: list[ImageMetric] = [
        KernelDistance(Projection(), reference, subset_size=8),
        KernelDistance(Projection(), reference, subset_size=9, subsets=3),
        KernelDistance(Projection(), other, subset_size=9),
        FrechetDistance(Projection(), reference),
        Precision(Projection(), reference),
        Recall(Projection(), reference),
        Recall(Projection(), reference, neighbours=2),
        InceptionScore(Projection()),
        InceptionScore(Projection(seed=1)),
        InceptionScore(Projection(seed=1), splits=2),
    ]
    found = [json.dumps(identity) for identity in (again, *(metric.identity() for metric in different))]
    assert len(set(found)) == len(found)
