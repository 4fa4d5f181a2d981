from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from lit_shortcut.bases.maskgit.imagenet import Size, imagenet_sizes
from lit_shortcut.bases.maskgit.transformer import NAMES as MASKGIT
from lit_shortcut.bases.maskgit.transformer import MaskGITTransformer
from lit_shortcut.networks.shortcut import NAMES as SHORTCUT
from lit_shortcut.networks.shortcut import ShortcutNet
from lit_shortcut.published import Names, fill, load_state, save_published
from lit_shortcut.weights import WeightsError, load_tensors

GOLDEN, META = load_tensors(Path(__file__).parent / "parity" / "maskgit_tiny.safetensors")
SIZES = {
    "codebook_size": META["codebook_size"],
    "num_classes": META["nclass"],
    "grid": META["grid"],
    "width": META["hidden_dim"],
    "depth": META["depth"],
    "num_heads": META["heads"],
    "mlp_width": META["mlp_dim"],
}


class Case(NamedTuple):
    """A published state dict, and how it is loaded and spelled."""

    state: dict[str, Tensor]
    names: Names
    load: Callable[[Path], nn.Module]


def published(prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in GOLDEN.items() if name.startswith(prefix)}


def load_transformer(path: Path, **changes: int) -> MaskGITTransformer:
    return MaskGITTransformer.load_published(path, **(SIZES | changes))


def load_shortcut(path: Path) -> ShortcutNet:
    return ShortcutNet.load_published(path, META["heads"])


@pytest.fixture(params=["base", "shortcut"])
def case(request: pytest.FixtureRequest) -> Case:
    if request.param == "base":
        return Case(published("base."), MASKGIT, load_transformer)
    return Case(published("shortcut."), SHORTCUT, load_shortcut)


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def test_published_file_loads_value_by_value_and_frozen(case: Case, tmp_path: Path) -> None:
    network = case.load(saved(tmp_path / "a.pth", case.state))
    loaded = network.state_dict()
    assert len(loaded) == len(case.state)  # no two names fall together
    for name, tensor in case.state.items():
        assert torch.equal(loaded[case.names.ours(name)].flatten(), tensor.flatten())
    assert not network.training
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in network.parameters())


def test_names_there_and_back_are_the_same(case: Case) -> None:
    for name in case.state:
        assert case.names.ours(name) != name
        assert case.names.published(case.names.ours(name)) == name


@pytest.mark.parametrize("key", ["model_state_dict", "state_dict"])
def test_state_dict_is_found_within_a_checkpoint(case: Case, tmp_path: Path, key: str) -> None:
    path = saved(tmp_path / "a.pth", {"iter": 1_500_000, "global_epoch": 300, key: case.state})
    assert load_state(path).keys() == case.state.keys()


def test_every_tensor_that_does_not_fit_is_named_as_the_file_spells_it(case: Case, tmp_path: Path) -> None:
    gone, misshapen = sorted(name for name in case.state if "in_proj_" in name)[:2]
    state = {name: tensor for name, tensor in case.state.items() if name != gone} | {
        misshapen: torch.zeros(3, 5),
        "ema.decay": torch.zeros(1),
        "transformer.layers.0.2.norm.weight": torch.zeros(1),
        "blocks.0.third_attn.norm.bias": torch.zeros(1),
    }
    with pytest.raises(WeightsError) as caught:
        case.load(saved(tmp_path / "a.pth", state))
    message = str(caught.value)
    assert str(tmp_path / "a.pth") in message
    assert f"{gone} is missing, expected {tuple(case.state[gone].shape)}" in message
    assert f"{misshapen} has shape (3, 5), expected {tuple(case.state[misshapen].shape)}" in message
    for unknown in ("ema.decay", "transformer.layers.0.2.norm.weight", "blocks.0.third_attn.norm.bias"):
        assert f"{unknown} is unknown" in message
    assert message.count("\n") == 5


def test_transposed_weight_is_refused(case: Case, tmp_path: Path) -> None:
    name = next(name for name, tensor in case.state.items() if tensor.ndim == 2 and len(set(tensor.shape)) == 2)
    with pytest.raises(WeightsError, match=f"{name} has shape"):
        case.load(saved(tmp_path / "a.pth", case.state | {name: case.state[name].T}))


def test_half_precision_file_becomes_single_precision(case: Case, tmp_path: Path) -> None:
    halves = {name: tensor.half() for name, tensor in case.state.items()}
    network = case.load(saved(tmp_path / "a.pth", halves))
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}


def test_checkpoint_of_another_grid_tells_both_sizes(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pth", {"model_state_dict": published("base.")})
    with pytest.raises(WeightsError) as caught:
        load_transformer(path, grid=4)
    message = str(caught.value)
    assert "MaskGITTransformer with codebook_size 32, num_classes 10, grid 4" in message
    assert "bias has shape (65, 44), expected (17, 44)" in message
    assert "pos_emb has shape (1, 65, 64), expected (17, 64)" in message


def test_checkpoint_of_another_depth_names_every_layer_too_many(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pth", published("base."))
    with pytest.raises(WeightsError) as caught:
        load_transformer(path, depth=1)
    assert str(caught.value).count("is unknown") == 2 * len([n for n in published("base.") if "layers.0." in n])


def test_layers_of_two_digits_keep_their_number(tmp_path: Path) -> None:
    state = published("base.")
    deep = {
        name.replace("layers.0.", f"layers.{layer}."): tensor + layer
        for layer in range(24)
        for name, tensor in state.items()
        if "layers.0." in name
    } | {name: tensor for name, tensor in state.items() if "transformer.layers." not in name}
    network = load_transformer(saved(tmp_path / "a.pth", deep), depth=24)
    first = state["transformer.layers.0.1.fn.net.3.bias"]
    for layer in (0, 9, 10, 23):
        assert torch.equal(network.state_dict()[f"layers.{layer}.mlp.2.bias"], first + layer)


@pytest.mark.parametrize("content", [[1], {"iter": 3}, {"model_state_dict": {"a": 1}}, {}], ids=str)
def test_file_without_a_state_dict_is_refused(case: Case, tmp_path: Path, content: Any) -> None:
    with pytest.raises(WeightsError, match=r"a\.pth: expected a state dict.*model_state_dict.*found"):
        case.load(saved(tmp_path / "a.pth", content))


@pytest.mark.parametrize("keep", [0, 100, 50_000])
def test_truncated_file_is_refused_by_name(case: Case, tmp_path: Path, keep: int) -> None:
    path = saved(tmp_path / "a.pth", case.state)
    assert path.stat().st_size > keep
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(WeightsError, match=r"a\.pth: not a checkpoint"):
        case.load(path)


def test_file_that_is_no_checkpoint_at_all_is_refused_by_name(case: Case, tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(b"hello world, no pickle")
    with pytest.raises(WeightsError, match=r"a\.pth: not a checkpoint"):
        case.load(path)


def test_missing_file_is_refused_by_name(case: Case, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"absent\.pth: no such"):
        case.load(tmp_path / "absent.pth")


def test_other_networks_file_is_refused_as_a_shortcut(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"a\.pth: expected a MIGM-Shortcut state dict.*found bias, first_layer"):
        load_shortcut(saved(tmp_path / "a.pth", published("base.")))
    with pytest.raises(WeightsError, match="num_heads 5"):
        ShortcutNet.load_published(saved(tmp_path / "b.pth", published("shortcut.")), num_heads=5)


def test_shortcut_without_its_blocks_is_refused(tmp_path: Path) -> None:
    state = {name: tensor for name, tensor in published("shortcut.").items() if not name.startswith("blocks.")}
    with pytest.raises(WeightsError, match=r"a\.pth: num_blocks must be at least 1"):
        load_shortcut(saved(tmp_path / "a.pth", state))


@pytest.mark.parametrize(
    ("size", "width", "depth"), [("base", 768, 24), ("big", 1024, 32), ("huge", 1024, 48)], ids=["base", "big", "huge"]
)
@pytest.mark.parametrize("grid", [16, 32])
def test_transformer_at_published_sizes_has_their_parameters(size: Size, width: int, depth: int, grid: int) -> None:
    with torch.device("meta"):
        transformer = MaskGITTransformer(**imagenet_sizes(grid, size))
    rows, vocabulary, linear, norm = grid**2 + 1, 1024 + 1 + 1000 + 1, width**2 + width, 2 * width
    layer = 2 * norm + 4 * linear + 3072 * width + 3072 + width * 3072 + width
    ends = 3 * linear + 4 * norm + (vocabulary + rows) * width + rows * vocabulary
    assert sum(parameter.numel() for parameter in transformer.parameters()) == depth * layer + ends


def test_released_shortcut_returns_bit_for_bit(tmp_path: Path) -> None:
    state = published("shortcut.")
    save_published(tmp_path / "ours.pth", load_shortcut(saved(tmp_path / "a.pth", state)), SHORTCUT)
    returned = torch.load(tmp_path / "ours.pth", weights_only=True)
    assert type(returned) is dict
    assert returned.keys() == state.keys()
    for name, tensor in state.items():
        assert returned[name].dtype == tensor.dtype
        assert torch.equal(returned[name].view(torch.int32), tensor.view(torch.int32))


@pytest.mark.parametrize(
    "hparams",
    [
        {"bottleneck_ratio": 1.0},
        {"bottleneck_ratio": 1.5, "num_blocks": 2},
        {"bottleneck_ratio": 3.0, "num_blocks": 12, "num_heads": 4},
        {"bottleneck_ratio": 1.01, "num_heads": 5, "uses_time": False},
    ],
    ids=str,
)
def test_shortcut_of_any_shape_returns_from_its_published_form(tmp_path: Path, hparams: dict[str, Any]) -> None:
    network = ShortcutNet(**({"width": 96, "num_heads": 2} | hparams))
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    save_published(tmp_path / "a.pth", network, SHORTCUT)
    returned = ShortcutNet.load_published(tmp_path / "a.pth", network.hparams["num_heads"])
    for name in ("width", "num_heads", "num_blocks", "uses_time"):
        assert returned.hparams[name] == network.hparams[name]
    assert returned.hparams["bottleneck_ratio"] == pytest.approx(network.hparams["bottleneck_ratio"], rel=0.02)
    assert ShortcutNet(**returned.hparams).state_dict().keys() == network.state_dict().keys()
    features, control, share = torch.randn(2, 7, 96), torch.randn(2, 3, 96), torch.rand(2)
    assert torch.equal(returned(features, control, share), network(features, control, share))


def test_bottleneck_whose_ratio_rounds_below_its_width_returns(tmp_path: Path) -> None:
    rounded_below = [(c, i) for c in range(2, 400) for i in range(1, c) if int(c / (c / i)) != i]
    width, inner = rounded_below[0]
    network = ShortcutNet(width, 1, math.nextafter(width / inner, 1))
    assert network.last[1].out_features == inner
    save_published(tmp_path / "a.pth", network, SHORTCUT)
    returned = ShortcutNet.load_published(tmp_path / "a.pth", num_heads=1)
    assert ShortcutNet(**returned.hparams).last[1].out_features == inner


def test_fill_takes_the_tensors_over_without_a_copy() -> None:
    state = published("base.")
    with torch.device("meta"):
        network = MaskGITTransformer(**SIZES)
    fill(network, state, MASKGIT, Path("a.pth"))
    assert network.token_embedding.weight.data_ptr() == state["tok_emb.weight"].data_ptr()
    assert network.position_embedding.data_ptr() == state["pos_emb"].data_ptr()
