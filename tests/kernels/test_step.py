"""One token at a time, natively: linear maps of few rows and the mLSTM step, against torch in float64."""

from __future__ import annotations

import pytest
import torch
from jaxtyping import TypeCheckError
from processive.errors import ShapeError
from processive.kernels import MLSTMState, linear_rows, mlstm, native, reference, rows
from processive.kernels.step import mlstm_step
from torch import nn
from torch.nn.functional import layer_norm, linear, logsigmoid

needs_native = pytest.mark.skipif(native.variant() is None, reason="the native kernels are not there")


def exact(x, weight, bias, norm, residual):
    """The formula in float64."""
    x = x.double()
    if norm is not None:
        norm_bias = None if norm.bias is None else norm.bias.double()
        x = layer_norm(x, x.shape[1:], norm.weight.double(), norm_bias, norm.eps)
    y = linear(x, weight.double(), None if bias is None else bias.double())
    return y if residual is None else y + residual.double()


def operands(count, inputs, outputs, *, full):
    x, weight = torch.randn(count, inputs) + 0.5, torch.randn(outputs, inputs)
    if not full:
        return x, weight, None, None, None
    norm = rows.Norm(torch.randn(inputs), torch.randn(inputs), 1e-5)
    return x, weight, torch.randn(outputs), norm, torch.randn(count, outputs)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 6, 7, 20])
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (16, 33), (64, 64), (71, 130)], ids=str)
@pytest.mark.parametrize("full", [False, True])
def test_linear_rows(count, shape, full, assert_close):
    x, weight, bias, norm, residual = operands(count, *shape, full=full)
    got = linear_rows(x, weight, bias, norm=norm, residual=residual)
    assert got.dtype == torch.float32
    if shape[0] > 1 or norm is None:  # one number less its mean is noise
        assert_close([got], [exact(x, weight, bias, norm, residual)], 1e-6)


@needs_native
@pytest.mark.parametrize("count", [1, 3, 8, 9, 17])
def test_the_native_product_takes_any_number_of_rows(count, assert_close):
    x, weight, bias, norm, residual = operands(count, 35, 21, full=True)
    want = exact(x, weight, bias, norm, residual)
    out = torch.full((count, 21), torch.nan)
    assert_close([rows.native_rows(x, weight, bias, norm=norm, residual=residual, out=out)], [want], 1e-6)
    rows.native_rows(x, weight, bias, norm=norm, residual=residual, out=residual)  # in place of the residual
    assert torch.equal(out, residual)


@needs_native
@pytest.mark.parametrize("count", [1, 5])
def test_narrow_weights_meet_few_rows_exactly(count, assert_close):
    x, weight, bias, norm, residual = operands(count, 71, 40, full=True)
    narrow = weight.bfloat16()
    got = linear_rows(x, narrow, bias, norm=norm, residual=residual)
    assert_close([got], [exact(x, narrow, bias, norm, residual)], 1e-6)


@pytest.mark.parametrize("count", [1, 5, 40])
def test_narrow_weights_err_no_more_than_torch(count):
    x, weight, bias, _, _ = operands(count, 256, 64, full=True)
    want = exact(x, weight, bias, None, None)
    theirs = linear(x.bfloat16(), weight.bfloat16(), bias.bfloat16()).double() - want
    ours = linear_rows(x, weight.bfloat16(), bias).double() - want
    assert (
        ours.square().mean().sqrt() <= theirs.square().mean().sqrt() * 1.5
    )  # where they add the bias before they round
    assert ours.abs().max() > 0


def test_narrow_weights_have_gradients(assert_close, grads):
    x, weight, bias, norm, residual = operands(4, 24, 12, full=True)
    leaves = [x, weight.bfloat16(), bias, norm.weight, norm.bias, residual]
    leaves = [leaf.requires_grad_() for leaf in leaves]

    def run(x, weight, bias, norm_weight, norm_bias, residual, function):
        y = function(x, weight, bias, norm=rows.Norm(norm_weight, norm_bias, 1e-5), residual=residual)
        return grads([y], [x, weight, bias, norm_weight, norm_bias, residual])

    got = run(*leaves, linear_rows)
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    want = run(*doubles, lambda x, w, b, *, norm, residual: exact(x, w, b, norm, residual))
    assert_close(got, want, 2**-7)  # products of bfloat16


def test_what_does_not_fit_is_refused():
    x, weight, bias, norm, residual = operands(2, 5, 3, full=True)
    with pytest.raises(ShapeError, match=r"norm\.weight"):
        linear_rows(x, weight, norm=norm._replace(weight=bias))
    for wrong in ((x[:, :4], weight), (x, weight, bias[:2])):
        with pytest.raises((ShapeError, TypeCheckError)):  # the latter where annotations are checked, as in these tests
            linear_rows(*wrong)
    with pytest.raises((ShapeError, TypeCheckError)):
        linear_rows(x, weight, residual=residual[:1])


def test_strided_operands_are_read_right(assert_close):
    x, weight = torch.randn(3, 20)[:, ::2], torch.randn(10, 7).t()
    assert_close([linear_rows(x, weight)], [exact(x, weight, None, None, None)], 1e-6)


@needs_native
@pytest.mark.parametrize("sequences", [1, 3, 64])
@pytest.mark.parametrize("dims", [(1, 1), (5, 3), (16, 33), (35, 64)], ids=str)
@pytest.mark.parametrize("hard", [False, True])
def test_mlstm_step(sequences, dims, hard, assert_close, cu):
    heads, (qk_dim, v_dim) = 2, dims
    shapes = (sequences, heads, qk_dim, v_dim), (sequences, heads, qk_dim), (sequences, heads)
    state = wanted = MLSTMState(*map(torch.randn, shapes))
    for _ in range(100):
        q, k = torch.randn(sequences, heads, qk_dim), torch.randn(sequences, heads, qk_dim)
        v, i, f = torch.randn(sequences, heads, v_dim), torch.randn(sequences, heads), torch.randn(sequences, heads)
        i, f = (6 * i, 8 * f - 4) if hard else (i, f + 1)
        before = [part.clone() for part in state]
        h, after = mlstm_step(q, k, v, i, logsigmoid(f), state=state)
        assert all(map(torch.equal, state, before))  # a state is a value
        want, wanted = reference.mlstm(q, k, v, i, f, cu_seqlens=cu([1] * sequences), initial_state=wanted)
        state = MLSTMState(*after)
        assert_close([h, *state], [want, *wanted], 1e-4 if hard else 1e-5)


@needs_native
def test_mlstm_step_is_the_step_of_mlstm(assert_close, cu):
    q, k, v = (torch.randn(4, 3, 24) for _ in range(3))
    i, f = torch.randn(4, 3), torch.randn(4, 3)
    state = MLSTMState(torch.randn(4, 3, 24, 24), torch.randn(4, 3, 24), torch.randn(4, 3))
    h, after = mlstm_step(q, k, v, i, logsigmoid(f), state=state)
    want, wanted = mlstm(q, k, v, i, f, cu_seqlens=cu([1] * 4), initial_state=state, return_state=True, backend="torch")
    assert_close([h, *after], [want, *wanted], 1e-6)


def test_the_layer_uses_its_weight_whatever_its_dtype():
    from processive.backbones.layers import Linear

    layer, plain = Linear(16, 8), nn.Linear(16, 8)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(3, 16)
    torch.testing.assert_close(layer(x), plain(x))
    layer.weight.data = layer.weight.data.bfloat16()
    assert layer(x).dtype == torch.float32
    torch.testing.assert_close(layer(x), plain(x), rtol=0.02, atol=0.02)
