"""Causal convolution against its float64 reference, and against torch's own."""

from __future__ import annotations

import pytest
import torch
from processive.errors import ShapeError
from processive.kernels import causal_conv1d, reference
from torch import Tensor

CHANNELS = 5


def random_inputs(tokens: int, taps: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    shapes = (tokens, CHANNELS), (CHANNELS, taps), (CHANNELS,)
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("taps", [1, 4])
@pytest.mark.parametrize("with_state", [False, True])
def test_equals_reference(lengths, taps, with_state, reverse, cu, grads, assert_close):
    leaves = random_inputs(sum(lengths), taps)
    if with_state:
        leaves.append(torch.randn(len(lengths), taps - 1, CHANNELS, dtype=torch.float64, requires_grad=True))
    doubles = [x.detach().clone().requires_grad_() for x in leaves]
    options = {"cu_seqlens": cu(lengths), "reverse": reverse}
    y, last = causal_conv1d(*leaves[:3], initial_state=leaves[3] if with_state else None, return_state=True, **options)
    want = reference.causal_conv1d(*doubles[:3], initial_state=doubles[3] if with_state else None, **options)
    assert_close([y, last, *grads([y, last], leaves)], [*want, *grads(want, doubles)], 1e-10)


def test_float32_equals_reference(cu, grads, assert_close):
    leaves = random_inputs(100, 4, torch.float32)
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    y, (want, _) = (
        causal_conv1d(*leaves, cu_seqlens=cu([60, 40])),
        reference.causal_conv1d(*doubles, cu_seqlens=cu([60, 40])),
    )
    assert_close([y, *grads([y], leaves)], [want, *grads([want], doubles)], 1e-5)


def test_equals_torch():
    x, weight, bias = random_inputs(20, 4)
    padded = torch.nn.functional.pad(x.T[None], (3, 0))
    want = torch.nn.functional.conv1d(padded, weight[:, None], bias, groups=CHANNELS)[0].T
    torch.testing.assert_close(causal_conv1d(x, weight, bias), want)
    torch.testing.assert_close(causal_conv1d(x, weight), want - bias)


def test_streamed_equals_whole():
    x, weight, bias = random_inputs(20, 4)
    whole, last = causal_conv1d(x, weight, bias, return_state=True)
    outputs, state = [], torch.zeros(1, 3, CHANNELS, dtype=x.dtype)
    for piece in x.split([1, 2, 0, 12, 5]):
        y, state = causal_conv1d(piece, weight, bias, initial_state=state, return_state=True)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs), whole)
    torch.testing.assert_close(state, last)


def test_no_gradient_reaches_the_future_or_crosses_a_boundary(cu):
    x, weight, bias = random_inputs(30, 4)
    (gradient,) = torch.autograd.grad(causal_conv1d(x, weight, bias, cu_seqlens=cu([10, 15, 5]))[11].sum(), x)
    assert (gradient[:10] == 0).all() and (gradient[12:] == 0).all() and (gradient[10:12] != 0).all()


def test_what_does_not_fit_is_refused(cu):
    x, weight, bias = random_inputs(6, 4)
    with pytest.raises(ShapeError, match="cu_seqlens"):
        causal_conv1d(x, weight, bias, cu_seqlens=torch.tensor([0, 7]))
    with pytest.raises(ShapeError, match="initial_state"):
        causal_conv1d(x, weight, bias, initial_state=torch.zeros(2, 3, CHANNELS, dtype=x.dtype))
    with pytest.raises(ShapeError, match="at least one tap"):
        causal_conv1d(x, weight[:, :0], bias)
