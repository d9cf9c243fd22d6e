"""Block-diagonal maps, norms and activations: every backend against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from jaxtyping import TypeCheckError
from processive.errors import ConfigError, ShapeError
from processive.kernels import activation, available_backends, block_linear, gated_norm, reference, rms_norm
from torch import Tensor

TOKENS = [0, 1, 7, 8, 9, 300]


def doubled(leaves: list[Tensor]) -> list[Tensor]:
    return [x.detach().double().requires_grad_() for x in leaves]


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("maps", [1, 2, 3])
@pytest.mark.parametrize("backend", available_backends("block_linear"))
def test_block_linear_equals_reference(backend, maps, tokens, grads, assert_close):
    leaves = [torch.randn(tokens, 48).requires_grad_(), torch.randn(maps, 12, 4, 4).requires_grad_()]
    doubles = doubled(leaves)
    got, want = block_linear(*leaves, backend=backend), reference.block_linear(*doubles)
    assert_close([*got, *grads(got, leaves)], [*want, *grads(want, doubles)], 1e-6)


@pytest.mark.parametrize(("blocks", "block"), [(12, 4), (3, 4), (5, 3), (2, 20)])
def test_block_linear_of_any_size(blocks, block, grads, assert_close):
    leaves = [torch.randn(6, blocks * block).requires_grad_(), torch.randn(2, blocks, block, block).requires_grad_()]
    doubles = doubled(leaves)
    got, want = block_linear(*leaves), reference.block_linear(*doubles)
    exact = block_linear(*doubles)
    found, truth = [*got, *grads(got, leaves)], [*want, *grads(want, doubles)]
    assert_close(found, truth, 1e-6)
    assert_close([*exact, *grads(exact, doubles)], truth, 1e-12)


@pytest.mark.parametrize("backend", available_backends("block_linear"))
def test_block_linear_reads_a_part_of_wider_rows_and_one_output_may_be_unused(backend, grads, assert_close):
    wide, weight = torch.randn(30, 64).requires_grad_(), torch.randn(2, 8, 4, 4).requires_grad_()
    doubles = doubled([wide, weight])
    (_, got), (_, want) = (
        block_linear(wide[:, 32:], weight, backend=backend),
        reference.block_linear(doubles[0][:, 32:], doubles[1]),
    )
    assert_close([got, *grads([got], [wide, weight])], [want, *grads([want], doubles)], 1e-6)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("with_skip", [False, True])
@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
@pytest.mark.parametrize("backend", available_backends("gated_norm"))
def test_gated_norm_equals_reference(backend, activation, with_skip, tokens, grads, assert_close):
    heads, head_dim = 3, 32
    width = heads * head_dim
    leaves = [
        torch.randn(tokens, heads, head_dim) * 3 + 2,
        torch.randn(heads, head_dim),
        torch.randn(tokens, 2 * width) * 4,
    ]
    if with_skip:
        leaves += [torch.randn(tokens, width), torch.randn(width)]
    leaves = [x.requires_grad_() for x in leaves]

    def run(function, h, weight, wide, skip=None, skip_weight=None, **options):
        gate = wide[:, width:]  # rows apart
        return function(h, weight, gate, skip=skip, skip_weight=skip_weight, activation=activation, **options)

    doubles = doubled(leaves)
    got, want = run(gated_norm, *leaves, backend=backend), run(reference.gated_norm, *doubles)
    assert_close([got, *grads([got], leaves)], [want, *grads([want], doubles)], 2e-6)


@pytest.mark.parametrize("backend", available_backends("gated_norm"))
def test_gated_norm_far_from_zero(backend, assert_close):
    """Means much larger than spreads, constant heads, and gates that overflow exp."""
    h = torch.randn(5, 2, 16) + 1000
    h[3] = 7.0
    gate = torch.tensor([-1e4, -100.0, 0.0, 100.0]).repeat(8).expand(5, 32)
    got = gated_norm(h, torch.ones(2, 16), gate, backend=backend)
    want = reference.gated_norm(h.double(), torch.ones(2, 16).double(), gate.double())
    assert_close([got], [want], 1e-3)
    assert (got[3] == 0).all()


@pytest.mark.parametrize("head_dim", [5, 16])
def test_gated_norm_of_any_size_and_dtype(head_dim, assert_close):
    h, weight, gate = (torch.randn(s, dtype=torch.float64) for s in ((4, 1, head_dim), (1, head_dim), (4, head_dim)))
    want = reference.gated_norm(h, weight, gate)
    assert_close([gated_norm(h, weight, gate)], [want], 1e-12)
    assert_close([gated_norm(h.float(), weight.float(), gate.float())], [want], 1e-6)
    low = gated_norm(h.bfloat16(), weight.bfloat16(), gate.bfloat16())
    assert low.dtype == torch.bfloat16
    assert_close([low], [want], 2e-2)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("width", [16, 112, 160])
@pytest.mark.parametrize("backend", available_backends("rms_norm"))
def test_rms_norm_equals_reference(backend, width, tokens, grads, assert_close):
    leaves = [(torch.randn(tokens, width) * 3 + 2).requires_grad_(), torch.randn(width).requires_grad_()]
    doubles = doubled(leaves)
    got, want = rms_norm(*leaves, 1e-3, backend=backend), reference.rms_norm(*doubles, 1e-3)
    assert_close([got, *grads([got], leaves)], [want, *grads([want], doubles)], 1e-6)


@pytest.mark.parametrize("width", [5, 16])
def test_rms_norm_of_any_size_shape_and_dtype(width, assert_close):
    x, weight = torch.randn(2, 3, width, dtype=torch.float64), torch.randn(width, dtype=torch.float64)
    x[1, 1] = 0
    want = reference.rms_norm(x, weight, 1e-5)
    assert_close([rms_norm(x, weight, 1e-5)], [want], 1e-12)
    assert_close([rms_norm(x.float().mT.contiguous().mT, weight.float(), 1e-5)], [want], 1e-6)
    assert rms_norm(x.bfloat16(), weight.bfloat16(), 1e-5).dtype == torch.bfloat16


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("inner", [1, 16, 37, 128])
@pytest.mark.parametrize("kind", ["gelu", "geglu", "swiglu"])
@pytest.mark.parametrize("backend", available_backends("activation"))
def test_activation_equals_reference(backend, kind, inner, tokens, grads, assert_close):
    leaves = [(torch.randn(tokens, inner * (1 if kind == "gelu" else 2)) * 3).requires_grad_()]
    doubles = doubled(leaves)
    got, want = activation(*leaves, kind, backend=backend), reference.activation(*doubles, kind)
    assert got.shape == (tokens, inner)
    assert_close([got, *grads([got], leaves)], [want, *grads([want], doubles)], 1e-6)


@pytest.mark.parametrize("kind", ["gelu", "geglu", "swiglu"])
@pytest.mark.parametrize("backend", available_backends("activation"))
def test_activation_at_the_ends_of_the_line(backend, kind):
    x = torch.tensor([-1e30, -100.0, -9.0, -4.0, -1e-3, 0.0, 1e-3, 4.0, 9.0, 100.0, 1e30]).requires_grad_()
    whole = x if kind == "gelu" else torch.cat((x, torch.ones(11)))
    y = activation(whole[None], kind, backend=backend)[0]
    (dx,) = torch.autograd.grad(y.sum(), x)
    double = x.detach().double().requires_grad_()
    wide = double if kind == "gelu" else torch.cat((double, torch.ones(11).double()))
    want = reference.activation(wide[None], kind)[0]
    (dwant,) = torch.autograd.grad(want.sum(), double)
    torch.testing.assert_close(y.double(), want, rtol=1e-6, atol=4e-6)
    torch.testing.assert_close(dx[1:-1].double(), dwant[1:-1], rtol=1e-6, atol=4e-6)
    assert activation(torch.full((1, 2), torch.nan), "gelu", backend=backend).isnan().all()


def test_activation_of_other_dtypes(assert_close):
    x = torch.randn(4, 6, dtype=torch.float64)
    for kind in ("gelu", "geglu", "swiglu"):
        assert_close([activation(x, kind)], [reference.activation(x, kind)], 1e-12)
        assert activation(x.bfloat16(), kind).dtype == torch.bfloat16


def test_what_does_not_fit_is_refused():
    x, weight = torch.randn(3, 12), torch.randn(2, 3, 4, 4)
    with pytest.raises(ShapeError, match="x, weight"):
        block_linear(x, weight[:, :2])
    h, norm, gate = torch.randn(3, 2, 5), torch.randn(2, 5), torch.randn(3, 10)
    with pytest.raises(ShapeError, match="gate"):
        gated_norm(h, norm, gate[:, :5])
    with pytest.raises(ShapeError, match="both or neither"):
        gated_norm(h, norm, gate, skip=gate)
    with pytest.raises(ConfigError, match="activation"):
        gated_norm(h, norm, gate, activation="relu")
    if "native" in available_backends("gated_norm"):
        with pytest.raises(ConfigError, match="width that 16 divides"):
            block_linear(x, weight, backend="native")
        with pytest.raises(ConfigError, match="multiple of 16"):
            gated_norm(h, norm, gate, backend="native")
    with pytest.raises(ConfigError, match="no activation"):
        activation(gate, "tanh")
    with pytest.raises(ShapeError, match="even"):
        activation(norm, "swiglu")
    with pytest.raises((ShapeError, TypeCheckError)):  # the latter where annotations are checked, as in these tests
        rms_norm(gate, torch.ones(5), 1e-5)
    if "native" in available_backends("rms_norm"):
        with pytest.raises(ConfigError, match="16 divides"):
            rms_norm(gate, torch.ones(10), 1e-5, backend="native")
        with pytest.raises(ConfigError, match="does not take"):
            activation(gate.double(), "gelu", backend="native")
