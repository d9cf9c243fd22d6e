"""Rotary positions against their float64 reference."""

from __future__ import annotations

import pytest
import torch
from processive.errors import ConfigError, ShapeError
from processive.kernels import reference, rotary


@pytest.mark.parametrize("style", ["half", "interleaved"])
@pytest.mark.parametrize("dim", [2, 6, 10])
@pytest.mark.parametrize("tokens", [0, 1, 65])
@pytest.mark.parametrize(("dtype", "rms_ratio"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_equals_reference(style, dim, tokens, dtype, rms_ratio, grads, assert_close):
    x = torch.randn(tokens, 3, dim, dtype=dtype, requires_grad=True)
    double = x.detach().double().requires_grad_()
    positions = torch.randint(0, 10**7, (tokens,))
    got, want = rotary(x, positions, base=500, style=style), reference.rotary(double, positions, base=500, style=style)
    assert got.dtype == dtype
    assert_close([got, *grads([got], [x])], [want, *grads([want], [double])], rms_ratio)


@pytest.mark.parametrize("style", ["half", "interleaved"])
def test_products_depend_on_the_distance_only(style):
    q, k = torch.randn(2, 1, 1, 8, dtype=torch.float64)
    products = [
        (rotary(q, torch.tensor([p + 5]), style=style) * rotary(k, torch.tensor([p]), style=style)).sum()
        for p in (0, 3, 900)
    ]
    torch.testing.assert_close(products[1:], products[:1] * 2)
    assert not torch.isclose(products[0], (q * k).sum())


def test_what_does_not_fit_is_refused():
    with pytest.raises(ShapeError, match="even dim"):
        rotary(torch.zeros(2, 1, 5), torch.arange(2))
    with pytest.raises(ConfigError, match="base"):
        rotary(torch.zeros(2, 1, 4), torch.arange(2), base=0)
