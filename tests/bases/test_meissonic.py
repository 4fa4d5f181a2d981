"""Meissonic and Monetico from a folder in the published form, whole and damaged, and at other sizes than published."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_shortcut.acceleration.accelerated import Accelerated, Vanilla
from lit_shortcut.acceleration.plans import Even
from lit_shortcut.acceleration.shortcut import Shortcut
from lit_shortcut.bases.clip_text import EncodedContext
from lit_shortcut.bases.meissonic.published import published, random_weights, read_sizes
from lit_shortcut.bases.meissonic.transformer import MeissonicTransformer
from lit_shortcut.contracts import Clock, Conditions
from lit_shortcut.interface import TokenInterface
from lit_shortcut.networks.shortcut import ShortcutNet
from lit_shortcut.sampling import Decoding, generate
from lit_shortcut.weights import WeightsError
from tests.published_amused import text_model
from tests.published_meissonic import SIZES, tiny_meissonic, transformer, write_folder

WEIGHTS = "diffusion_pytorch_model.safetensors"
RESAMPLED = {"downsample": True, "upsample": True}
Prompted = Callable[..., Conditions]
DECODING = Decoding(3, "cosine_each", guidance=2.0, guidance_course="constant", temperature=0, confidence_noise=0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published") / "it"
    write_folder(folder, **RESAMPLED)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(whole, tmp_path / "copy")


def test_folder_becomes_a_base_with_its_weights(whole: Path) -> None:
    base = published(str(whole), dtype="float32")
    assert base.size == (1024, 1024)
    assert base.spec[:2] == (4096, 1024)
    assert not any(tensor.is_meta for tensor in (*base.parameters(), *base.buffers()))
    expected = transformer(**RESAMPLED).state_dict()
    assert base.transformer.state_dict().keys() == expected.keys()
    assert all(torch.equal(base.transformer.state_dict()[name], tensor) for name, tensor in expected.items())


def test_transformer_without_resampling_is_for_512_pixels(tmp_path: Path) -> None:
    write_folder(tmp_path / "monetico")
    base = published(str(tmp_path / "monetico"))
    assert base.size == (512, 512)
    assert base.spec[:2] == (1024, 1024)
    assert base.transformer.embed.embeddings.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(("height", "width"), [(64, 32), (96, 96)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_images_have_the_size_asked_for(whole: Path, prompted: Prompted, height: int, width: int, dtype: str) -> None:
    base = published(str(whole), height=height, width=width, dtype=dtype, negative="blurry")  # type: ignore[arg-type]
    context = base.context(prompted(2), guided=True)
    assert isinstance(context, EncodedContext)
    assert context.micro_conds[0, 0].tolist() == [width, height, 0, 0, 6]
    tokens, _ = generate(base, prompted(2), DECODING, Vanilla())
    assert base.decode(tokens).shape == (2, 3, height, width)


def test_features_depend_on_the_steps_that_follow_only(prompted: Prompted) -> None:
    base, tokens = tiny_meissonic(), torch.full((2, 16), 9)
    context = base.context(prompted(2), guided=False)
    features = base.features(tokens, context, Clock(3, 8))
    assert torch.equal(base.features(tokens, context, Clock(0, 5)), features)
    assert not torch.allclose(base.features(tokens, context, Clock(4, 8)), features)


def test_time_beyond_half_precision_is_refused(prompted: Prompted) -> None:
    base = tiny_meissonic().half()
    context = base.context(prompted(1), guided=False)
    assert bool(base.features(torch.full((1, 16), 9), context, Clock(0, 66)).isfinite().all())
    with pytest.raises(ValueError, match="num_steps must be at most 66 in float16, got 67"):
        base.features(torch.full((1, 16), 9), context, Clock(0, 67))


def test_each_place_of_a_square_has_logits_of_its_own(prompted: Prompted) -> None:
    base = tiny_meissonic(**RESAMPLED)
    features = base.features(torch.full((1, 16), 9), base.context(prompted(1), guided=False), Clock(0, 4))
    assert features.shape == (1, 1, 4, 24)
    square = base.interface.logits(features, torch.tensor([[0, 1, 4, 5]]))[0, 0]
    assert torch.equal(base.interface.rows_of(torch.tensor([0, 1, 4, 5, 2])), torch.tensor([0, 0, 0, 0, 1]))
    assert len(square.unique(dim=0)) == 4


def test_interface_is_kept_without_the_base(prompted: Prompted) -> None:
    base = tiny_meissonic(**RESAMPLED)
    kept = TokenInterface.from_tensors(base.interface.kind, base.interface.to_tensors())
    features = base.features(torch.full((1, 16), 9), base.context(prompted(1), guided=False), Clock(0, 4))
    assert torch.equal(kept.logits(features), base.interface.logits(features))


def test_shortcut_on_the_rows_hears_of_tokens_on_the_grid(prompted: Prompted) -> None:
    base = tiny_meissonic(**RESAMPLED)
    network = ShortcutNet(24, num_heads=2, grid=4, reach=2, stride=2)
    exact = generate(base, prompted(2), DECODING, Accelerated(Even(3), Shortcut(network)))
    assert torch.equal(exact.tokens, generate(base, prompted(2), DECODING, Vanilla()).tokens)
    _, full_steps = generate(base, prompted(2), DECODING, Accelerated(Even(1), Shortcut(network)))
    assert full_steps.tolist() == [1, 1]
    of_tokens = Shortcut(ShortcutNet(24, num_heads=2, grid=4, reach=2))
    with pytest.raises(WeightsError, match="4 image rows; stride 1 of the shortcut gives 16"):
        generate(base, prompted(2), DECODING, Accelerated(Even(1), of_tokens))


# ---- files


def test_half_precision_files_are_taken(tmp_path: Path) -> None:
    write_folder(tmp_path / "half", variant="fp16")
    base = published(str(tmp_path / "half"), variant="fp16", dtype="float32")
    assert torch.equal(base.interface.head_weight, transformer().half().float().mlm_layer.conv2.weight[..., 0, 0])


def test_tensors_missing_unknown_and_misshapen_are_all_named(folder: Path) -> None:
    path = folder / "transformer" / WEIGHTS
    tensors = load_file(path)
    tensors["up_block.upsample.conv.bias"] = tensors.pop("up_block.upsample.conv.weight")
    tensors["embed.layer_norm.weight"] = torch.ones(3)
    save_file(tensors, path)
    with pytest.raises(WeightsError) as caught:
        published(str(folder))
    assert str(caught.value).splitlines()[1:] == [
        "  up_block.upsample.conv.weight is missing, expected (24, 24, 2, 2)",
        "  up_block.upsample.conv.bias is unknown",
        "  embed.layer_norm.weight has shape (3,), expected (24,)",
    ]
    assert "num_single_layers 2" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": "14"}, "num_layers: expected a whole number, found '14'"),
        ({"vocab_size": None}, "vocab_size: expected a whole number, found None"),
        ({"axes_dims_rope": 12}, "axes_dims_rope: expected whole numbers, found 12"),
        ({"axes_dims_rope": [4, 4, 8]}, "axes_dims_rope must be three even numbers that sum to .* 12"),
        ({"downsample": 1}, "downsample: expected a bool, found 1"),
        ({"upsample": False}, "upsample must be as downsample"),
        ({"guidance_embeds": True}, "guidance_embeds: expected false, found True"),
        ({"pooled_projection_dim": 20}, "pooled_projection_dim must be the width 24, got 20"),
        ({"codebook_size": 10}, "codebook_size must lie below vocab_size 10, got 10"),
    ],
)
def test_configuration_of_another_network_is_refused(folder: Path, change: dict[str, object], message: str) -> None:
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(WeightsError, match=rf"config\.json: {message}"):
        published(str(folder))


def test_text_encoder_may_come_from_elsewhere(folder: Path, tmp_path: Path) -> None:
    other = text_model(seed=1, projection_dim=24)
    other.save_pretrained(tmp_path / "clip")
    base = published(str(folder), height=64, width=64, text_encoder=str(tmp_path / "clip"), dtype="float32")
    texts = ["a cat"]
    expected = other.eval().requires_grad_(False)(base.text_encoder.tokenizer.ids(texts, 20)).text_embeds  # type: ignore[attr-defined]
    torch.testing.assert_close(base.text_encoder.encode(texts).pooled, expected)
    text_model().save_pretrained(tmp_path / "narrow")
    with pytest.raises(WeightsError, match=r"narrow: expected .* widths \(16, 24\), found \(16, 12\)"):
        published(str(folder), text_encoder=str(tmp_path / "narrow"))


@pytest.mark.parametrize("pixels", [0, 48])
def test_size_that_fits_no_grid_is_refused(whole: Path, pixels: int) -> None:
    with pytest.raises(ValueError, match=f"height .* got {pixels}"):
        published(str(whole), height=pixels, width=64)


# ---- sizes without weights


def test_random_weights_are_labelled_and_of_published_sizes() -> None:
    base = random_weights(depth=0, single_depth=1, text_depth=1)
    assert base.fingerprint.startswith("random-")
    assert base.spec[:5] == (4096, 1024, 1024, 8192, 8255)


def test_published_sizes_have_about_a_billion_parameters() -> None:
    with torch.device("meta"):
        network = MeissonicTransformer(**RESAMPLED)
    assert sum(parameter.numel() for parameter in network.parameters()) == pytest.approx(1e9, rel=0.1)


def test_sizes_are_those_of_the_configuration(whole: Path) -> None:
    assert read_sizes(whole / "transformer" / "config.json") == SIZES | RESAMPLED
