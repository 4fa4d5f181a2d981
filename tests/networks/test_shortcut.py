from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_shortcut.interface import Places
from lit_shortcut.networks.llada_shortcut import LLaDAShortcutNet
from lit_shortcut.networks.neighbourhood import ConvBlock, Neighbourhood
from lit_shortcut.networks.rows import ALL_ROWS, Rows, RowsAt, RowsWhere
from lit_shortcut.networks.shortcut import ShortcutNet, ShortcutNetwork, sinusoids
from lit_shortcut.weights import load_module_with_metadata, save_module

BATCH, SEQUENCE, WIDTH, CONTROL = 3, 6, 16, 4


def make(randomly: bool = True, **hparams: Any) -> ShortcutNet:
    """With ``randomly``, no parameter is left at a special value."""
    torch.manual_seed(0)
    network = ShortcutNet(WIDTH, **({"num_heads": 2} | hparams))
    if randomly:
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.3)
    return network.eval()


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(BATCH, SEQUENCE, WIDTH), torch.randn(BATCH, CONTROL, WIDTH), torch.tensor([0.1, 0.5, 1.0])


def test_untrained_network_holds_and_is_still_trained_by_gradients() -> None:
    network = make(randomly=False)
    features, control, share = inputs()
    following = network(features, control, share)
    assert torch.equal(following, features)
    following.square().sum().backward()
    assert network.widen.weight.grad is not None
    assert network.widen.weight.grad.abs().max() > 0


@pytest.mark.parametrize("hparams", [{}, {"bottleneck_ratio": 1}, {"num_blocks": 2}, {"uses_time": False}])
def test_padding_of_control_does_not_change_the_output(hparams: dict[str, Any]) -> None:
    network = make(**hparams)
    features, control, share = inputs()
    padded = torch.cat([control, torch.full((BATCH, 3, WIDTH), 50.0)], dim=1)
    is_real = torch.arange(CONTROL + 3).expand(BATCH, -1) < CONTROL
    expected = network(features, control, share)
    torch.testing.assert_close(network(features, padded, share, is_real), expected, rtol=1e-5, atol=1e-5)
    assert (network(features, padded, share) - expected).abs().max() > 1e-3  # the mask is what hides it


def test_rows_may_be_padded_each_in_its_own_way() -> None:
    network = make()
    features, control, share = inputs()
    counts = [1, 4, 2]
    is_real = torch.arange(CONTROL) < torch.tensor(counts)[:, None]
    together = network(features, control, share, is_real)
    for row, count in enumerate(counts):
        one = slice(row, row + 1)
        alone = network(features[one], control[one, :count], share[one])
        torch.testing.assert_close(together[one], alone, rtol=1e-5, atol=1e-5)


def test_control_tokens_are_a_set() -> None:
    network = make()
    features, control, share = inputs()
    expected = network(features, control, share)
    torch.testing.assert_close(network(features, control.flip(1), share), expected, rtol=1e-5, atol=1e-5)
    assert (network(features, control + 1, share) - expected).abs().max() > 1e-3


def test_no_control_tokens_work_and_equal_padding_alone() -> None:
    network = make()
    features, control, share = inputs()
    nothing = network(features, control[:, :0], share)
    assert bool(nothing.isfinite().all())
    padding = network(features, control, share, torch.zeros(BATCH, CONTROL, dtype=torch.bool))
    torch.testing.assert_close(nothing, padding, rtol=1e-5, atol=1e-5)
    nothing.sum().backward()
    assert all(parameter.grad is not None for parameter in network.blocks.parameters())  # DDP waits for each


def test_time_conditions_the_output() -> None:
    network = make()
    features, control, share = inputs()
    assert (network(features, control, share) - network(features, control, share / 2)).abs().max() > 1e-3


def test_without_time_the_masked_share_has_no_part_and_no_parameters() -> None:
    network = make(uses_time=False)
    features, control, share = inputs()
    assert torch.equal(network(features, control, share), network(features, control, share / 2))
    assert not [name for name, _ in network.named_parameters() if "time" in name or "modulation" in name]


@pytest.mark.parametrize(("ratio", "inner"), [(1, 16), (2, 8), (4, 4), (8 / 3, 6)])
def test_bottleneck_ratio_sets_the_inner_width(ratio: float, inner: int) -> None:
    network = make(bottleneck_ratio=ratio)
    projections = [name for name, _ in network.named_parameters() if name.startswith(("narrow", "widen"))]
    assert bool(projections) == (ratio > 1)
    assert {block.cross_attention.out_proj.out_features for block in network.blocks} == {inner}  # type: ignore[union-attr]
    features, control, share = inputs()
    assert network(features, control, share).shape == features.shape


def test_sizes_at_imagenet_are_the_published_ones() -> None:
    """The hidden width of the time network is round(√(256·384)) = 314."""
    with torch.device("meta"):
        network = ShortcutNet(768)
    assert network.time_mlp[0].out_features == 314
    count = sum(parameter.numel() for parameter in network.parameters())
    inner, hidden = 384, 314
    attention, mlp = 4 * inner**2 + 4 * inner, 8 * inner**2 + 5 * inner
    block = 2 * (attention + mlp + 2 * 2 * inner)
    projections = 2 * (768 * inner + inner) + inner * 768 + 768
    last, time = inner**2 + 5 * inner, 257 * hidden + hidden * inner + inner + inner * 2 * inner + 2 * inner
    assert count == block + projections + last + time


def test_sinusoids_are_cosines_then_sines_at_geometric_frequencies() -> None:
    share = torch.tensor([0.0, 0.25, 1.0])
    values = sinusoids(1000 * share)
    assert values.shape == (3, 256)
    assert values[0].tolist() == [1.0] * 128 + [0.0] * 128
    for row, r in enumerate(share.tolist()):
        for k in (0, 1, 64, 127):
            angle = 1000 * r * math.exp(-math.log(10000) * k / 128)
            assert values[row, k].item() == pytest.approx(math.cos(angle), abs=1e-3)
            assert values[row, 128 + k].item() == pytest.approx(math.sin(angle), abs=1e-3)


@pytest.mark.parametrize("ratio", [0, 0.5, 0.99])
def test_ratio_below_one_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match=f"bottleneck_ratio must be at least 1, got {ratio}"):
        ShortcutNet(WIDTH, 2, ratio)


@pytest.mark.parametrize("num_heads", [3, 16])
def test_heads_that_do_not_divide_the_inner_width_are_refused(num_heads: int) -> None:
    with pytest.raises(ValueError, match=f"width 8 and num_heads {num_heads}"):
        ShortcutNet(WIDTH, num_heads)


@pytest.mark.parametrize("hparams", [{}, {"bottleneck_ratio": 1, "num_blocks": 2, "uses_time": False}])
def test_load_returns_what_was_saved_frozen(tmp_path: Path, hparams: dict[str, Any]) -> None:
    network = make(**hparams)
    save_module(tmp_path / "shortcut.safetensors", network)
    loaded = ShortcutNet.load(tmp_path / "shortcut.safetensors")
    assert torch.equal(loaded(*inputs()), network(*inputs()))
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


# ---- options

OPTIONS: list[dict[str, Any]] = [
    {},
    {"uses_control": False},
    {"uses_self_attention": False},
    {"uses_time": False},
    {"rows": "masked", "num_blocks": 2},
    {"anchored": True},
    {"anchored": True, "rows": "masked", "uses_control": False},
    {"grid": 2, "reach": 1},
    {"guided": True},
    {"grid": 2, "num_convs": 2},
    {"grid": 2, "reach": 1, "num_convs": 1, "rows": "masked", "uses_states": True, "anchored": True},
]


def make_llada(**options: Any) -> LLaDAShortcutNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = LLaDAShortcutNet(WIDTH, num_heads=2, mlp_width=12, **options)
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.3)
    return network.eval()


of_both_kinds = pytest.mark.parametrize("kind", [make, make_llada])


def places(network: ShortcutNetwork) -> Places:
    rows, control = (network.encode_places(torch.arange(count).expand(BATCH, -1)) for count in (SEQUENCE, CONTROL))
    committed = torch.tensor([2, 0]).expand(BATCH, -1)
    return Places(rows, control, committed=committed, committed_rows=committed)


def run(network: ShortcutNetwork, features: Tensor, control: Tensor, rows: Rows = ALL_ROWS, gap: int = 1) -> Tensor:
    share, gaps = torch.tensor([0.1, 0.5, 1.0]), torch.full((BATCH,), gap)
    following: Tensor = network(features, control, share, None, places(network), rows, gaps)
    return following


@of_both_kinds
@pytest.mark.parametrize("options", OPTIONS)
def test_every_parameter_has_a_part_whatever_the_options(
    kind: Callable[..., ShortcutNetwork], options: dict[str, Any]
) -> None:
    network = kind(**options)
    features, control, _ = inputs()
    run(network, features, control).square().sum().backward()
    assert not [name for name, parameter in network.named_parameters() if parameter.grad is None]


@of_both_kinds
@pytest.mark.parametrize("options", [{}, {"num_blocks": 2}, {"grid": 2, "num_convs": 1, "uses_states": True}])
def test_chosen_rows_are_predicted_alike_by_index_and_by_mask_and_others_stay(
    kind: Callable[..., ShortcutNetwork], options: dict[str, Any]
) -> None:
    network = kind(rows="masked", **options)
    features, control, _ = inputs()
    index = torch.tensor([[4, 0], [1, 2], [3, 4]])
    mask = torch.zeros(BATCH, SEQUENCE - 1, dtype=torch.bool).scatter(1, index, value=True)
    found = run(network, features, control, RowsAt(index, SEQUENCE))
    torch.testing.assert_close(run(network, features, control, RowsWhere(mask)), found, rtol=1e-4, atol=1e-5)
    chosen = torch.nn.functional.pad(mask, (0, 1))
    assert torch.equal(found[~chosen], features[~chosen])
    assert ((found - features)[chosen].abs().amax(-1) > 1e-3).all()
    moved = features.clone()
    moved[~chosen] += 1
    assert (run(network, moved, control, RowsAt(index, SEQUENCE)) - found)[
        chosen
    ].abs().amin() > 0  # they are still attended to
    everything = torch.arange(SEQUENCE).expand(BATCH, -1).flip(1)
    torch.testing.assert_close(
        run(network, features, control, RowsAt(everything, SEQUENCE)),
        run(network, features, control),
        rtol=1e-4,
        atol=1e-5,
    )


@of_both_kinds
def test_without_control_tokens_play_no_part(kind: Callable[..., ShortcutNetwork]) -> None:
    network = kind(uses_control=False)
    features, control, _ = inputs()
    assert torch.equal(run(network, features, control), run(network, features, control + 1))
    assert not [name for name in network.state_dict() if "cross" in name or "narrow_control" in name]


@of_both_kinds
def test_without_self_attention_rows_know_of_control_tokens_only(kind: Callable[..., ShortcutNetwork]) -> None:
    network = kind(uses_self_attention=False)
    features, control, _ = inputs()
    moved = features.clone()
    moved[:, 0] += 1
    assert torch.equal(run(network, moved, control)[:, 1:], run(network, features, control)[:, 1:])
    assert not torch.equal(run(network, features, control + 1)[:, 1:], run(network, features, control)[:, 1:])
    assert not [name for name in network.state_dict() if "self" in name]


@of_both_kinds
def test_anchored_network_knows_its_gap(kind: Callable[..., ShortcutNetwork]) -> None:
    features, control, share = inputs()
    network = kind(anchored=True)
    assert not torch.allclose(run(network, features, control, gap=1), run(network, features, control, gap=3))
    assert torch.equal(run(kind(), features, control, gap=1), run(kind(), features, control, gap=3))
    with pytest.raises(ValueError, match="gap"):
        network(features, control, share, None, places(network))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"rows": "some"}, "rows"),
        ({"anchored": True, "uses_time": False}, "uses_time"),
        ({"uses_control": False, "grid": 2, "reach": 1}, "reach"),
        ({"num_blocks": 0}, "num_blocks"),
        ({"num_convs": 1}, "num_convs"),
        ({"uses_states": True, "rows": "masked"}, "uses_states"),
        ({"uses_states": True, "grid": 2}, "uses_states"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        make(**options)


@of_both_kinds
@pytest.mark.parametrize("options", OPTIONS)
def test_file_and_use_agree_on_the_options(
    kind: Callable[..., ShortcutNetwork], options: dict[str, Any], tmp_path: Path
) -> None:
    network = kind(**options)
    save_module(tmp_path / "shortcut.safetensors", network)
    loaded, _ = load_module_with_metadata((ShortcutNet, LLaDAShortcutNet), tmp_path / "shortcut.safetensors")
    assert loaded.options == network.options
    features, control, _ = inputs()
    assert torch.equal(run(loaded, features, control), run(network, features, control))


# ---- neighbourhood


def with_reach(reach: int, grid: int = 5) -> ShortcutNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = ShortcutNet(8, num_heads=1, grid=grid, reach=reach)
        nn.init.normal_(network.widen.weight)
    return network.eval()


@pytest.mark.parametrize(("stride", "reached"), [(1, 3), (3, 1)])
def test_neighbourhood_reaches_so_far_and_no_farther(stride: int, reached: int) -> None:
    neighbourhood = Neighbourhood(4, grid=6, reach=1, stride=stride)
    control, features, side = torch.randn(1, 1, 4), torch.randn(1, 1, 4), 6 // stride
    nothing = neighbourhood(control[:, :0], features[:, :0], torch.zeros(1, 0, dtype=torch.long), None)
    changed = (neighbourhood(control, features, torch.tensor([[7]]), None) - nothing).abs().sum(-1).view(side, side) > 0
    expected = torch.zeros(side, side, dtype=torch.bool)
    expected[:reached, :reached] = True  # place 7 is (1, 1)
    assert torch.equal(changed, expected)


@pytest.mark.parametrize(("stride", "row"), [(1, 13), (2, 3), (3, 0)])
def test_neighbourhood_takes_a_token_together_with_the_features_at_its_place(stride: int, row: int) -> None:
    network, seen = make(grid=6, reach=1, stride=stride), []
    assert network.neighbourhood is not None
    network.neighbourhood.register_forward_hook(lambda module, given, made: seen.append(made))
    control, x, place = torch.randn(1, 1, WIDTH), torch.randn(1, 37, WIDTH), torch.tensor([[13]])  # (2, 1)
    where = Places(committed=place, committed_rows=torch.tensor([[row]]))
    network(x, control, torch.ones(1), places=where)
    for moved in range(37):
        others = x.clone()
        others[0, moved] += torch.randn(WIDTH)
        network(others, control, torch.ones(1), places=where)
        assert torch.equal(seen[-1], seen[0]) == (moved != row)


def test_neighbourhood_knows_where_a_token_stands_and_padding_is_nowhere() -> None:
    network, features, control = with_reach(2), torch.randn(1, 26, 8), torch.randn(1, 2, 8)
    share, is_real = torch.tensor([0.5]), torch.tensor([[True, False]])
    here, there = (Places(committed=at, committed_rows=at) for at in torch.tensor([[[3, 12]], [[20, 12]]]))
    with torch.inference_mode():
        alone = Places(committed=torch.tensor([[3]]), committed_rows=torch.tensor([[3]]))
        one = network(features, control[:, :1], share, places=alone)
        padded = network(features, control, share, is_real, here)
        assert not torch.allclose(network(features, control, share, is_real, there), padded)
        torch.testing.assert_close(padded, one)


def test_network_without_a_reach_is_the_published_one() -> None:
    names = ShortcutNet(8, num_heads=1).state_dict().keys()
    assert {name for name in with_reach(2).state_dict() if name not in names} == {
        f"neighbourhood.{part}"
        for part in (
            f"{layer}.{kind}"
            for layer in ("norm", "features_norm", "gate", "pair", "spread", "mix")
            for kind in ("weight", "bias")
        )
    }


def test_convolutions_begin_at_the_identity_and_reach_two_rows_in_the_image_only() -> None:
    block, x = ConvBlock(4, side=6, reach=2), torch.randn(1, 38, 4)  # two rows belong to a prefix
    assert torch.equal(block(x, x, ALL_ROWS), x)
    nn.init.normal_(block.mlp[2].weight)
    moved = x.clone()
    moved[0, 7] += torch.randn(4)  # (1, 1)
    changed = (block(moved, moved, ALL_ROWS) - block(x, x, ALL_ROWS)).abs().sum(-1)[0] > 0
    expected = torch.zeros(6, 6, dtype=torch.bool)
    expected[:4, :4] = True
    assert torch.equal(changed, torch.cat([expected.flatten(), torch.zeros(2, dtype=torch.bool)]))


def test_states_tell_masked_new_and_old_rows_apart_and_padding_is_none() -> None:
    network = make(grid=3, rows="masked", uses_states=True)
    seen: list[Tensor] = []
    assert network.states is not None
    network.states.register_forward_hook(lambda module, given, made: seen.append(given[0]))
    features, control = torch.randn(2, 10, WIDTH), torch.randn(2, 3, WIDTH)
    masked, committed = torch.tensor([[0, 1], [7, 8]]), torch.tensor([[5, 3, 0], [2, 6, 4]])
    is_real = torch.tensor([[True, True, False], [True, True, True]])
    rows, share = RowsAt(masked, 10), torch.ones(2)
    network(features, control, share, is_real, Places(committed=committed, committed_rows=committed), rows)
    assert seen[0].tolist() == [[2, 2, 0, 1, 0, 1, 0, 0, 0, 0], [0, 0, 1, 0, 1, 0, 1, 2, 2, 0]]


def test_reach_needs_a_grid_and_places() -> None:
    with pytest.raises(ValueError, match=r"grid must be .* reach, got 0"):
        ShortcutNet(8, num_heads=1, reach=2)
    with pytest.raises(ValueError, match="needs the places of the tokens committed"):
        with_reach(1)(torch.randn(1, 26, 8), torch.randn(1, 1, 8), torch.ones(1))
