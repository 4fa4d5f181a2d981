from __future__ import annotations

import urllib.error
from pathlib import Path

import pytest
import torch
import torch_fidelity
import torch_fidelity.feature_extractor_inceptionv3 as theirs
from torch import Tensor, nn

from lit_shortcut.metrics.distances import FrechetDistance
from lit_shortcut.metrics.inception import InceptionFeatures
from lit_shortcut.weights import WeightsError
from tests.metrics.asked import asked
from tests.metrics.reference import Images, write_reference


class Touch:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights whose features do not vanish, as torch's own initialisation would let them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(theirs, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(theirs.FeatureExtractorInceptionV3, "load_state_dict", lambda *args: None)
        network = theirs.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(network.state_dict(), path)
    return path


def random_images(count: int, seed: int, high: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, high, (count, 3, 24, 24), dtype=torch.uint8, generator=generator)


# 64 features take a second where the 2048 of FID take a minute, by the same code.
def test_distance_equals_torch_fidelitys(weights: Path, tmp_path: Path) -> None:
    real, generated = random_images(9, seed=1, high=256), random_images(8, seed=2, high=200)
    expected = torch_fidelity.calculate_metrics(
        input1=Images(generated),
        input2=Images(real),
        fid=True,
        feature_extractor="inception-v3-compat",
        feature_layer_fid="64",
        feature_extractor_weights_path=str(weights),
        cuda=False,
        cache=False,
        save_cpu_ram=True,  # no worker processes
        verbose=False,
    )["frechet_inception_distance"]
    extractor = InceptionFeatures(weights, "64")
    write_reference(tmp_path / "reference.safetensors", extractor, real.chunk(3), "random pixels")
    metric = FrechetDistance(extractor, tmp_path / "reference.safetensors")
    metric.update(generated, asked(torch.zeros(8)))
    assert expected > 0.01
    assert float(metric.compute()) == pytest.approx(expected, rel=1e-3)


def test_fid_has_2048_features_and_takes_grey_images(weights: Path) -> None:
    extractor = InceptionFeatures(weights)
    reference = theirs.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(weights))
    grey = random_images(1, seed=3, high=256)[:, :1]
    (expected,) = reference(grey.expand(-1, 3, -1, -1))
    assert extractor.num_features == 2048
    assert expected.any()
    assert torch.equal(extractor(grey), expected)


def test_missing_weights_say_where_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"none\.pth.*weights-inception-2015-12-05-6726825d\.pth.*`weights`"):
        InceptionFeatures(tmp_path / "none.pth")


def test_failed_download_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fail)
    with pytest.raises(WeightsError, match=r"no network.*weights-inception-2015-12-05-6726825d\.pth.*`weights`"):
        InceptionFeatures()


def test_download_reads_tensors_alone(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}

    def download(url: str, **kwargs: object) -> dict[str, Tensor]:
        asked.update(kwargs)
        state: dict[str, Tensor] = torch.load(weights)
        return state

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    InceptionFeatures(feature="64")
    assert asked["weights_only"] is True
    assert asked["check_hash"] is True


@pytest.mark.parametrize("content", [{"weight": torch.zeros(2)}, [torch.zeros(2)], {"epoch": 3}])
def test_other_contents_are_refused(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(WeightsError, match=r"other\.pth"):
        InceptionFeatures(tmp_path / "other.pth")


def test_code_in_a_weight_file_is_refused_and_never_run(tmp_path: Path) -> None:
    torch.save({"weight": Touch(tmp_path / "ran")}, tmp_path / "malicious.pth")
    with pytest.raises(WeightsError, match=r"malicious\.pth"):
        InceptionFeatures(tmp_path / "malicious.pth")
    assert not (tmp_path / "ran").exists()


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("not weights")
    with pytest.raises(WeightsError, match=r"text\.pth"):
        InceptionFeatures(tmp_path / "text.pth")
