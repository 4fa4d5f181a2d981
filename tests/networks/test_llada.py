from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lit_shortcut.interface import Places
from lit_shortcut.networks.llada import LLaDABlock, Rotation, rotate, rotation
from lit_shortcut.networks.llada_shortcut import LLaDAShortcutNet

THETA = 500_000.0


@pytest.fixture
def block() -> LLaDABlock:
    torch.manual_seed(0)
    return LLaDABlock(16, num_heads=2, mlp_width=24, norm_eps=1e-5).requires_grad_(False)


@pytest.fixture
def network() -> LLaDAShortcutNet:
    """Predicts something else than its input."""
    torch.manual_seed(0)
    network = LLaDAShortcutNet(16, num_heads=2, mlp_width=24, num_blocks=2)
    assert isinstance(network.widen, torch.nn.Linear)
    torch.nn.init.normal_(network.widen.weight)
    return network.eval().requires_grad_(False)


def by(places: Tensor) -> Rotation:
    return rotation(places, head_width=8, theta=THETA)


def at(network: LLaDAShortcutNet, of_rows: Tensor, of_control: Tensor, is_real: Tensor | None = None) -> Places:
    return Places(network.encode_places(of_rows), network.encode_places(of_control), is_real)


def rows(count: int, seed: int = 1, width: int = 16) -> Tensor:
    return torch.randn(2, count, width, generator=torch.Generator().manual_seed(seed))


def test_rotation_equals_multiplication_of_complex_numbers() -> None:
    heads, places = torch.randn(1, 1, 5, 8), torch.tensor([[0, 1, 2, 40, 4700]])
    planes = torch.complex(*heads.double().chunk(2, dim=-1))
    angles = places[0, :, None].double() * THETA ** -(torch.arange(4, dtype=torch.float64) / 4)
    turned = planes * torch.polar(torch.ones_like(angles), angles)
    expected = torch.cat([turned.real, turned.imag], dim=-1).float()
    torch.testing.assert_close(rotate(heads, by(places)), expected, rtol=1e-3, atol=1e-3)  # angle 4700 in float32
    torch.testing.assert_close(rotate(heads, by(places))[:, :, :4], expected[:, :, :4], rtol=1e-5, atol=1e-5)


def test_products_depend_on_the_distance_of_places_alone() -> None:
    query, key = torch.randn(2, 1, 1, 1, 8)
    here, there = (
        float((rotate(query, by(torch.tensor([[start]]))) * rotate(key, by(torch.tensor([[start + 7]])))).sum())
        for start in (0, 90)
    )
    assert here == pytest.approx(there, abs=1e-4)


def test_rotation_is_computed_in_single_precision_for_half_precision_rows() -> None:
    heads, places = torch.randn(1, 1, 1, 8).bfloat16(), torch.tensor([[1000]])
    rotated = rotate(heads, by(places))
    assert rotated.dtype == torch.bfloat16
    assert torch.equal(rotated, rotate(heads.float(), by(places)).bfloat16())


def test_order_of_rows_means_nothing_but_their_places_do(block: LLaDABlock) -> None:
    x, places = rows(6), torch.arange(6).expand(2, -1)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    expected = block(x, by(places))
    torch.testing.assert_close(block(x[:, order], by(places[:, order])), expected[:, order], rtol=1e-5, atol=1e-5)
    assert (block(x[:, order], by(places)) - expected[:, order]).abs().max() > 1e-3


def test_padding_changes_nothing(block: LLaDABlock, network: LLaDAShortcutNet) -> None:
    x, places = rows(6), torch.arange(6).expand(2, -1)
    is_real = torch.tensor([[True] * 4 + [False] * 2, [True] * 6])
    padded = block(x, by(places), is_real)
    torch.testing.assert_close(padded[:1, :4], block(x[:1, :4], by(places[:1, :4])), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(padded[1:], block(x[1:], by(places[1:])), rtol=1e-5, atol=1e-5)

    control, share = rows(3, seed=2), torch.tensor([0.5, 0.5])
    control_is_real = torch.tensor([[True, False, False], [True] * 3])
    following = network(x, control, share, control_is_real, at(network, places, places[:, :3], is_real))
    alone = network(x[:1, :4], control[:1, :1], share[:1], places=at(network, places[:1, :4], places[:1, :1]))
    torch.testing.assert_close(following[:1, :4], alone, rtol=1e-5, atol=1e-5)


def test_no_control_at_all_equals_padding_alone(network: LLaDAShortcutNet) -> None:
    x, places, share = rows(6), torch.arange(6).expand(2, -1), torch.tensor([0.5, 0.5])
    nothing = network(x, x[:, :0], share, places=at(network, places, places[:, :0]))
    assert bool(nothing.isfinite().all())
    padding = torch.zeros(2, 3, dtype=torch.bool)
    padded = network(x, rows(3), share, padding, at(network, places, places[:, :3]))
    torch.testing.assert_close(nothing, padded, rtol=1e-5, atol=1e-5)
    network.requires_grad_().zero_grad()
    network(x, x[:, :0], share, places=at(network, places, places[:, :0])).sum().backward()
    assert all(parameter.grad is not None for parameter in network.blocks.parameters())  # DDP waits for each


def test_control_counts_with_its_place(network: LLaDAShortcutNet) -> None:
    x, places, share, control = rows(6), torch.arange(6).expand(2, -1), torch.tensor([0.5, 0.5]), rows(2, seed=3)
    here = network(x, control, share, places=at(network, places, places[:, :2]))
    there = network(x, control, share, places=at(network, places, places[:, 2:4]))
    assert (here - there).abs().max() > 1e-3


def test_neighbourhood_is_of_committed_tokens_and_not_of_a_prompt_s() -> None:
    torch.manual_seed(0)
    network = LLaDAShortcutNet(16, num_heads=2, mlp_width=24, grid=2, reach=1).eval().requires_grad_(False)
    control, seen = rows(5), []
    assert network.neighbourhood is not None
    network.neighbourhood.register_forward_hook(lambda module, given, made: seen.append((*given, made)))
    committed = torch.tensor([[3, 0]] * 2)
    places = at(network, torch.arange(7)[None], torch.arange(5)[None])
    places = places._replace(committed=committed, committed_rows=committed)
    is_real = torch.tensor([[True, True, False, True, True], [True, True, True, True, False]])
    network(rows(7), control, torch.ones(2), is_real, places)
    ((tokens, _, positions, own_is_real, made),) = seen
    assert torch.equal(tokens, network.narrow_control(control)[:, 3:])  # the first three are a prompt's
    assert torch.equal(positions, places.committed)
    assert torch.equal(own_is_real, is_real[:, 3:])
    assert made.shape == (2, 4, 8)


def test_untrained_network_repeats_its_input() -> None:
    network = LLaDAShortcutNet(16, num_heads=2, mlp_width=24)
    x, places = rows(6), torch.arange(6).expand(2, -1)
    share = torch.tensor([0.5, 0.5])
    assert torch.equal(network(x, rows(2), share, places=at(network, places, places[:, :2])), x)


def test_parameters_have_no_bias_but_at_projections_and_time(network: LLaDAShortcutNet) -> None:
    biased = {name.split(".")[0] for name, _ in network.named_parameters() if name.endswith("bias")}
    assert biased == {"narrow_features", "narrow_control", "widen", "time_mlp", "modulation"}


def test_rows_without_places_are_refused(network: LLaDAShortcutNet) -> None:
    with pytest.raises(ValueError, match="interface has none"):
        network(rows(6), rows(2), torch.tensor([0.5, 0.5]))


def test_heads_that_cannot_be_rotated_are_refused() -> None:
    with pytest.raises(ValueError, match=r"multiple of 2 · num_heads, got width 6 and num_heads 2"):
        LLaDABlock(6, num_heads=2, mlp_width=8, norm_eps=1e-5)
