from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lit_shortcut.networks.attention import Attention, feed_forward

WIDTH, HEADS = 24, 4


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def twins() -> tuple[Attention, nn.MultiheadAttention]:
    ours, theirs = Attention(WIDTH, HEADS), nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    renamed = {k.replace("in_proj_", "in_proj."): v for k, v in theirs.state_dict().items()}
    ours.load_state_dict(renamed)
    return ours, theirs


def inputs(num_keys: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    is_real = torch.rand(3, num_keys) < 0.6
    is_real[:, :1] = True
    return torch.randn(3, 5, WIDTH), torch.randn(3, num_keys, WIDTH), is_real


@pytest.mark.parametrize("padded", [False, True])
def test_cross_attention_equals_torch(padded: bool) -> None:
    ours, theirs = twins()
    query, memory, is_real = inputs()
    mask = is_real if padded else None
    expected = theirs(query, memory, memory, key_padding_mask=None if mask is None else ~mask, need_weights=False)[0]
    torch.testing.assert_close(ours(query, memory, mask), expected, rtol=1e-5, atol=1e-5)


def test_self_attention_equals_torch() -> None:
    ours, theirs = twins()
    query, _, _ = inputs()
    expected = theirs(query, query, query, need_weights=False)[0]
    torch.testing.assert_close(ours(query, query), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours(query, query.clone()), expected, rtol=1e-5, atol=1e-5)


def test_gradients_equal_torch() -> None:
    ours, theirs = twins()
    query, memory, is_real = inputs()
    ours(query, memory, is_real).square().sum().backward()
    theirs(query, memory, memory, key_padding_mask=~is_real, need_weights=False)[0].square().sum().backward()
    torch.testing.assert_close(ours.in_proj.weight.grad, theirs.in_proj_weight.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.out_proj.weight.grad, theirs.out_proj.weight.grad, rtol=1e-4, atol=1e-4)


def test_contents_of_padding_have_no_part() -> None:
    ours, _ = twins()
    query, memory, is_real = inputs()
    other = torch.where(is_real[..., None], memory, 1e3)
    assert torch.equal(ours(query, memory, is_real), ours(query, other, is_real))


def test_row_of_padding_alone_gets_the_bias_and_finite_gradients() -> None:
    ours, _ = twins()
    query, memory, is_real = inputs()
    is_real[1] = False
    query.requires_grad_()
    mixed = ours(query, memory, is_real)
    torch.testing.assert_close(mixed[1], ours.out_proj.bias.expand(5, -1))
    torch.testing.assert_close(mixed[0], ours(query[:1], memory[:1], is_real[:1])[0])
    mixed.sum().backward()
    assert query.grad is not None
    assert bool(query.grad.isfinite().all())
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in ours.parameters())


@pytest.mark.parametrize("padded", [False, True])
def test_empty_memory_gets_the_bias(padded: bool) -> None:
    ours, _ = twins()
    query, memory, is_real = inputs(num_keys=0)
    torch.testing.assert_close(ours(query, memory, is_real if padded else None), ours.out_proj.bias.expand(3, 5, -1))


def test_width_that_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="width 24 and num_heads 5"):
        Attention(24, 5)


def test_feed_forward_is_linear_exact_gelu_linear() -> None:
    mlp = feed_forward(4, 9)
    x = torch.randn(2, 4)
    hidden = mlp[0](x)
    exact = 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))
    torch.testing.assert_close(mlp(x), mlp[2](exact))
