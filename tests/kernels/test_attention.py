"""Attention against its float64 reference: masks, shared heads, cache, packing, isolation."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from processive.errors import ConfigError, ShapeError
from processive.kernels import attention, reference
from torch import Tensor

DIM, V = 5, 7
OPTIONS = [
    {},
    {"causal": False},
    {"window": 4},
    {"causal": False, "window": 4},
    {"window": 1},
    {"scale": 0.3},
]


def random_inputs(
    queries: int, keys: int, heads: int, kv_heads: int, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    shapes = (queries, heads, DIM), (keys, kv_heads, DIM), (keys, kv_heads, V)
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def both(inputs, grads, **options):
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    y, want = attention(*inputs, **options), reference.attention(*doubles, **options)
    return [y, *grads([y], inputs)], [want, *grads([want], doubles)]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (3, 1)])
def test_equals_reference(options, heads, kv_heads, cu, grads, assert_close):
    lengths = [9, 1, 0, 20, 9, 3]
    inputs = random_inputs(sum(lengths), sum(lengths), heads, kv_heads)
    got, want = both(inputs, grads, cu_seqlens=cu(lengths), **options)
    assert_close(got, want, 1e-10, ["y", "dq", "dk", "dv"])


@pytest.mark.parametrize("lengths", [[1], [63, 64, 65], [1, 1, 1], [0, 0], []], ids=str)
def test_equals_reference_at_odd_lengths(lengths, cu, grads, assert_close):
    got, want = both(random_inputs(sum(lengths), sum(lengths), 2, 1), grads, cu_seqlens=cu(lengths))
    assert_close(got, want, 1e-10)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_queries_are_the_last_tokens_of_a_cache(options, cu, grads, assert_close):
    queries, keys = [1, 3, 0, 4, 1, 3], [6, 9, 5, 4, 6, 9]
    inputs = random_inputs(sum(queries), sum(keys), 4, 2)
    got, want = both(inputs, grads, cu_seqlens=cu(queries), cu_seqlens_k=cu(keys), **options)
    assert_close(got, want, 1e-10)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("causal", [True, False])
def test_prefix_sees_itself_both_ways(window, causal, cu, grads, assert_close):
    lengths = [6, 6, 6, 1, 12]
    prefix = torch.tensor([0, 4, 6, 1, 5])
    inputs = random_inputs(sum(lengths), sum(lengths), 2, 2)
    got, want = both(inputs, grads, cu_seqlens=cu(lengths), prefix=prefix, window=window, causal=causal)
    assert_close(got, want, 1e-10)


def test_float32_equals_reference(cu, grads, assert_close):
    inputs = random_inputs(280, 280, 4, 2, torch.float32)
    got, want = both(inputs, grads, cu_seqlens=cu([200, 80]))
    assert got[0].dtype == torch.float32
    assert_close(got, want, 1e-5)


def test_decoding_with_a_cache_equals_the_whole(cu):
    q, k, v = random_inputs(12, 12, 2, 2)
    whole = attention(q, k, v)
    pieces = [
        attention(q[a:b], k[:b], v[:b], cu_seqlens=cu([b - a]), cu_seqlens_k=cu([b]))
        for a, b in [(0, 5), (5, 6), (6, 12)]
    ]
    torch.testing.assert_close(torch.cat(pieces), whole)


def test_packed_equals_alone(cu):
    lengths = [30, 1, 8]
    inputs, edges = random_inputs(39, 39, 2, 2, torch.float32), cu(lengths).tolist()
    y = attention(*inputs, cu_seqlens=cu(lengths))
    for start, end in pairwise(edges):
        torch.testing.assert_close(y[start:end], attention(*(x[start:end] for x in inputs)), rtol=0, atol=5e-5)


def test_no_gradient_reaches_the_future_or_crosses_a_boundary(cu):
    inputs = random_inputs(30, 30, 2, 2)
    y = attention(*inputs, cu_seqlens=cu([10, 15, 5]))
    dq, dk, dv = torch.autograd.grad(y[17].sum(), inputs)
    assert (dq[:17] == 0).all() and (dq[18:] == 0).all()
    for gradient in (dk, dv):
        assert (gradient[:10] == 0).all() and (gradient[18:] == 0).all() and (gradient[10:18] != 0).any()


def test_what_does_not_fit_is_refused(cu):
    q, k, v = random_inputs(6, 6, 4, 2)
    with pytest.raises(ShapeError, match="cu_seqlens_k"):
        attention(q, k, v, cu_seqlens=cu([6]), cu_seqlens_k=cu([3, 3]))
    with pytest.raises(ShapeError, match="keys for at least"):
        attention(q, k, v, cu_seqlens=cu([4, 2]), cu_seqlens_k=cu([2, 4]))
    with pytest.raises(ShapeError, match="divides the 3"):
        attention(q[:, :3], k, v)
    with pytest.raises(ConfigError, match="window is 0"):
        attention(q, k, v, window=0)
    with pytest.raises(ConfigError, match="no backend"):
        attention(q, k, v, backend="flash")
