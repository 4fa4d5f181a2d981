"""What stands between features and codes, with one row a token and with one row for several."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.resnet import Upsample2D
from diffusers.models.unets.uvit_2d import ConvMlmLayer
from torch import Tensor

from lit_shortcut.contracts import Control
from lit_shortcut.interface import ConvolutionalInterface, TokenInterface
from lit_shortcut.networks.control import embed_control
from lit_shortcut.networks.shortcut import ShortcutNet

HEIGHT, WIDTH, CHANNELS, HIDDEN, CODES = 4, 6, 8, 5, 7
L = HEIGHT * WIDTH


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def convolutional(stride: int) -> ConvolutionalInterface:
    upsampling = {"upsampling_scale": torch.rand(CHANNELS), "upsampling_weight": torch.randn(4, CHANNELS, CHANNELS)}
    return ConvolutionalInterface(
        num_tokens=L,
        grid_width=WIDTH,
        stride=stride,
        code_embedding=torch.randn(CODES, CHANNELS),
        head_weight=torch.randn(CODES, HIDDEN),
        hidden_weight=torch.randn(HIDDEN, CHANNELS),
        hidden_scale=torch.rand(HIDDEN),
        **(upsampling if stride == 2 else {}),
    )


def linear() -> TokenInterface:
    table = torch.randn(CODES, CHANNELS)
    return TokenInterface(L, table, table, torch.randn(L, CHANNELS), torch.randn(L, CODES))


INTERFACES = pytest.mark.parametrize(
    "interface", [linear(), convolutional(1), convolutional(2)], ids=["linear", "one_row_a_token", "one_row_for_four"]
)


@INTERFACES
def test_logits_at_chosen_places_are_those_of_all_places(interface: TokenInterface) -> None:
    features = torch.randn(2, 3, interface.num_rows + 2, CHANNELS)
    every = interface.logits(features)
    assert every.shape == (2, 3, L, CODES)
    places = torch.stack([torch.randperm(L)[:5] for _ in range(3)])
    rows = features[:, torch.arange(3)[:, None], interface.rows_of(places)]
    for chosen in (interface.logits(features, places), interface.row_logits(rows, places)):
        torch.testing.assert_close(chosen, every[:, torch.arange(3)[:, None], places])


@INTERFACES
def test_masked_rows_are_those_of_masked_places(interface: TokenInterface) -> None:
    is_masked = torch.rand(3, L) < 0.3
    rows = interface.masked_rows(is_masked)
    assert rows.shape == (3, interface.num_rows)
    for sample in range(3):
        expected = interface.rows_of(is_masked[sample].nonzero().flatten()).unique()
        assert torch.equal(rows[sample].nonzero().flatten(), expected)


@INTERFACES
def test_interface_comes_back_from_its_tensors(interface: TokenInterface) -> None:
    tensors = interface.to_tensors()
    loaded = TokenInterface.from_tensors(interface.kind, tensors)
    assert type(loaded) is type(interface)
    features = torch.randn(2, interface.num_rows, CHANNELS)
    assert torch.equal(loaded.logits(features), interface.logits(features))
    places = torch.arange(CODES)[None]
    assert torch.equal(loaded.embed(places, places), interface.embed(places, places))
    tensors["code_embedding"].zero_()
    assert not torch.equal(loaded.code_embedding, interface.code_embedding)  # the tensors were copies


def broken(change: dict[str, Tensor | None]) -> dict[str, Tensor]:
    tensors = {**convolutional(2).to_tensors(), **change}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid_width": None}, "grid_width"),
        ({"head_weight": None}, "head_weight"),
        ({"other": torch.ones(1)}, "other"),
        ({"hidden_scale": torch.tensor([float("nan")])}, "hidden_scale: expected finite numbers"),
        ({"stride": torch.tensor(5)}, "multiples of 5"),
        ({"grid_width": torch.tensor(0)}, "0 a row"),
        ({"stride": torch.tensor(1)}, r"upsampling_weight: .*found shape \(4, 8, 8\)"),
        ({"upsampling_scale": None}, "belong together"),
        ({"head_weight": torch.ones(3, CHANNELS)}, r"head_weight: expected the shape .*found \(3, "),
    ],
)
def test_tensors_that_make_no_interface_are_refused(change: dict[str, Tensor | None], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenInterface.from_tensors("ConvolutionalInterface", broken(change))


def test_only_known_kinds_are_made() -> None:
    with pytest.raises(ValueError, match=r"expected TokenInterface or ConvolutionalInterface, found 'os\.system'"):
        TokenInterface.from_tensors("os.system", linear().to_tensors())


def test_head_is_that_of_diffusers_modules() -> None:
    up = Upsample2D(
        CHANNELS,
        use_conv_transpose=True,
        kernel_size=2,
        padding=0,
        norm_type="rms_norm",
        eps=1e-6,
        elementwise_affine=True,
        bias=False,
        interpolate=False,
    )
    mlm = ConvMlmLayer(CHANNELS, HIDDEN, False, True, 1e-6, CODES)
    for norm in (up.norm, mlm.layer_norm):
        torch.nn.init.uniform_(norm.weight)
    interface = ConvolutionalInterface(
        num_tokens=L,
        grid_width=WIDTH,
        stride=2,
        code_embedding=torch.randn(CODES, CHANNELS),
        head_weight=mlm.conv2.weight[:, :, 0, 0],
        hidden_weight=mlm.conv1.weight[:, :, 0, 0],
        hidden_scale=mlm.layer_norm.weight,
        upsampling_scale=up.norm.weight,
        upsampling_weight=up.conv.weight.permute(2, 3, 1, 0).flatten(0, 1),
    )
    coarse = torch.randn(2, CHANNELS, HEIGHT // 2, WIDTH // 2)
    expected = mlm(up(coarse)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(interface.logits(coarse.flatten(2).transpose(1, 2)), expected)


def test_shortcut_sees_control_on_the_fine_grid_and_moves_the_rows_beside_it() -> None:
    network = ShortcutNet(CHANNELS, num_heads=1, grid=8, reach=1, stride=2)
    assert network.neighbourhood is not None
    torch.nn.init.ones_(network.neighbourhood.spread.weight)
    inner = CHANNELS // 2
    position = torch.tensor([[3 * 8 + 4]])  # row 3, column 4: cell (1, 2), a place from cell (2, 2)
    beside = torch.randn(1, 1, inner)
    reached = network.neighbourhood(torch.randn(1, 1, inner), beside, position, None)
    idle = network.neighbourhood(torch.zeros(1, 1, inner), beside, position, torch.zeros(1, 1, dtype=torch.bool))
    moved = (reached - idle).abs().sum(-1).view(4, 4) > 1e-6
    assert moved.nonzero().tolist() == [[1, 1], [1, 2], [2, 1], [2, 2]]


@pytest.mark.parametrize("side", [1, 2])
def test_committed_tokens_are_beside_the_rows_that_give_their_logits(side: int) -> None:
    interface, positions = convolutional(side), torch.tensor([[0, 5], [7, 2]])
    places = embed_control(interface, Control(torch.zeros_like(positions), positions)).places
    assert places.committed_rows is not None
    assert torch.equal(places.committed_rows, interface.rows_of(positions))
    assert torch.equal(places.committed_rows, positions) == (side == 1)
