import math

import pytest
import torch
from processive.backbones.layers import (
    BlockLinear,
    CausalConvolution,
    FeedForward,
    HeadNorm,
    float32_linear,
    make_norm,
    small_init_,
    soft_cap,
    wang_init_,
)
from processive.errors import ConfigError


@pytest.mark.parametrize(("blocks", "block"), [(32, 4), (6, 4), (3, 4), (1, 4), (4, 20), (5, 1)])
@pytest.mark.parametrize("bias", [False, True])
def test_block_linear_is_a_block_diagonal_matrix(blocks, block, bias):
    layer = BlockLinear(2, blocks, block, init_width=8, bias=bias)
    if bias:
        torch.nn.init.normal_(layer.bias)
    x = torch.randn(7, blocks * block)
    for got, weight, offset in zip(layer(x), layer.weight, layer.bias if bias else (0.0, 0.0), strict=True):
        want = x @ torch.block_diag(*weight).T + (offset.flatten() if bias else 0.0)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("bias", [False, True])
def test_block_linear_followed_by_a_map(bias):
    layer = BlockLinear(2, 6, 4, init_width=8, bias=bias)
    if bias:
        torch.nn.init.normal_(layer.bias)
    x, after = torch.randn(5, 24), torch.randn(3, 48)
    weight, offset = layer.followed_by(after)
    want = torch.cat(layer(x), dim=1) @ after.T
    torch.testing.assert_close(torch.nn.functional.linear(x, weight, offset), want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("heads", [1, 3])
def test_head_norm_normalises_each_head_by_itself(heads):
    norm = HeadNorm(heads, 5, 1e-5)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(4, heads, 5) * 3 + 2
    want = torch.nn.functional.group_norm(x.flatten(1), heads, norm.weight.flatten(), None, 1e-5)
    torch.testing.assert_close(norm(x), want)


def test_norms_start_at_one_and_other_names_are_refused():
    for kind in ("layer", "rms"):
        assert torch.equal(make_norm(kind, 3, 1e-5).weight, torch.ones(3))
    with pytest.raises(ConfigError, match="batch"):
        make_norm("batch", 3, 1e-5)


def test_soft_cap():
    x = torch.tensor([-100.0, 0.0, 0.01, 100.0])
    torch.testing.assert_close(soft_cap(x, 5.0), 5 * torch.tanh(x / 5))
    assert soft_cap(x, None) is x


def test_float32_linear_keeps_digits_that_bfloat16_loses():
    x, weight = torch.randn(20, 300).bfloat16(), torch.randn(4, 300)
    want = x.double() @ weight.double().T
    got = float32_linear(x, weight, None)
    assert got.dtype == torch.float32
    assert (got - want).abs().max() < 1e-4
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(float32_linear(x, weight, None), got)
    assert float32_linear(x.double(), weight, None).dtype == torch.float64


def test_initialisations_have_their_published_spread():
    weight = torch.empty(400, 400)
    small_init_(weight, 50)
    assert weight.std().item() == pytest.approx(math.sqrt(2 / 250), rel=0.02)
    wang_init_(weight, 64, 3)
    assert weight.std().item() == pytest.approx(2 / (3 * 8), rel=0.02)


def test_gated_feed_forward_gates_with_the_first_half():
    layer = FeedForward(4, 6, 2, "swiglu")
    x = torch.randn(3, 4)
    gate, up = x @ layer.up.weight[:6].T, x @ layer.up.weight[6:].T
    torch.testing.assert_close(layer(x), (torch.nn.functional.silu(gate) * up) @ layer.down.weight.T)


def test_convolution_starts_as_torch_starts_it():
    layer = CausalConvolution(1000, 4)
    assert layer.weight.abs().max().item() == pytest.approx(0.5, abs=0.01)
