"""Rotary positions against their float64 reference."""

from __future__ import annotations

import pytest
import torch
from processive.errors import ConfigError, ShapeError
from processive.kernels import available_backends, reference, rotary

CASES = [("torch", torch.float64, 1e-10), *((name, torch.float32, 1e-5) for name in available_backends("rotary"))]


@pytest.mark.parametrize("style", ["half", "interleaved"])
@pytest.mark.parametrize("dim", [2, 6, 10, 32, 70])
@pytest.mark.parametrize("tokens", [0, 1, 65])
@pytest.mark.parametrize(("backend", "dtype", "rms_ratio"), CASES)
def test_equals_reference(style, dim, tokens, backend, dtype, rms_ratio, grads, assert_close):
    x = torch.randn(tokens, 3, dim, dtype=dtype, requires_grad=True)
    double = x.detach().double().requires_grad_()
    positions = torch.randint(0, 10**7, (tokens,))
    got = rotary(x, positions, base=500, style=style, backend=backend)
    want = reference.rotary(double, positions, base=500, style=style)
    assert got.dtype == dtype
    assert_close([got, *grads([got], [x])], [want, *grads([want], [double])], rms_ratio)


@pytest.mark.parametrize(("backend", "dtype", "rms_ratio"), CASES)
@pytest.mark.parametrize("style", ["half", "interleaved"])
def test_inputs_may_be_views(backend, dtype, rms_ratio, style, assert_close):
    joined, positions = torch.randn(20, 5, 12, dtype=dtype), torch.arange(40, dtype=torch.int32)[::2]
    for x in (joined[:, 1:3], joined.transpose(1, 2)[..., :4]):
        want = reference.rotary(x, positions, style=style)
        assert_close([rotary(x, positions, style=style, backend=backend)], [want], rms_ratio)


def test_the_gradient_has_a_gradient():
    x = torch.randn(9, 2, 6, requires_grad=True)
    (gradient,) = torch.autograd.grad(rotary(x, torch.arange(9)).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), x)
    torch.testing.assert_close(second, torch.full_like(x, 2.0))  # a rotation leaves the squared length as it is


def test_bfloat16_is_rounded_once():
    x, positions = torch.randn(40, 2, 32, dtype=torch.bfloat16), torch.arange(40) * 1000
    for backend in available_backends("rotary"):
        got = rotary(x, positions, backend=backend)
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.double(), reference.rotary(x, positions), rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("style", ["half", "interleaved"])
def test_products_depend_on_the_distance_only(style):
    q, k = torch.randn(2, 1, 1, 8, dtype=torch.float64)
    products = [
        (rotary(q, torch.tensor([p + 5]), style=style) * rotary(k, torch.tensor([p]), style=style)).sum()
        for p in (0, 3, 900)
    ]
    torch.testing.assert_close(products[1:], products[:1] * 2)
    assert not torch.isclose(products[0], (q * k).sum())


@pytest.mark.parametrize(("backend", "dtype", "rms_ratio"), CASES)
@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_frequencies_of_a_coarser_dtype(backend, dtype, rms_ratio, precision, assert_close):
    x, positions = torch.randn(50, 2, 12, dtype=dtype), torch.arange(50) * 37
    frequencies = 1 / 10000.0 ** (torch.arange(0, 12, 2).float() / 12)
    angles = positions[:, None, None] * frequencies.to(getattr(torch, precision)).double()
    a, b = x.double().chunk(2, -1)
    want = torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), -1)
    got = rotary(x, positions, precision=precision, backend=backend)
    assert_close([got], [want], rms_ratio)
    assert (got - rotary(x, positions, backend=backend)).abs().max() > {"float32": 1e-6}.get(precision, 1e-3)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ShapeError, match="even dim"):
        rotary(torch.zeros(2, 1, 5), torch.arange(2))
    with pytest.raises(ConfigError, match="base"):
        rotary(torch.zeros(2, 1, 4), torch.arange(2), base=0)
    with pytest.raises(ConfigError, match="float32, float16, bfloat16 or None, not 'float8'"):
        rotary(torch.zeros(2, 1, 4), torch.arange(2), precision="float8")
