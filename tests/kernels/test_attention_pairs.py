"""Attention with products of bfloat16 pairs: as near to the reference as torch's own in bfloat16, and isolated."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from processive.errors import ConfigError
from processive.kernels import attention, native, reference

pytestmark = pytest.mark.skipif(not native.has_bfloat16(), reason="the processor does not multiply bfloat16 pairs")

OPTIONS = [
    {},
    {"causal": False},
    {"window": 4},
    {"window": 69},
    {"causal": False, "window": 4},
    {"scale": 0.3},
    {"prefix": [2, 0, 40, 5, 3]},
    {"prefix": [2, 0, 40, 5, 3], "window": 3},
]


def inputs(queries, keys, heads=4, kv_heads=2, dims=(16, 16)):
    dim, v_dim = dims
    return [
        torch.randn(sum(n), h, d) for n, h, d in ((queries, heads, dim), (keys, kv_heads, dim), (keys, kv_heads, v_dim))
    ]


def close(given, **options):
    """Hold the error, in float64 and beside the reference, against that of torch in bfloat16."""
    given = [x.detach() for x in given]
    want = reference.attention(*(x.double() for x in given), **options)
    plain = attention(*(x.bfloat16() for x in given), backend="torch", **options)
    y = attention(*given, precision="bf16", **options)
    assert y.dtype == torch.float32 and torch.isfinite(y).all()
    error = (y.double() - want).norm() / want.norm()
    assert 1e-5 < error <= min(2 * (plain.double() - want).norm() / want.norm(), 1e-2)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2)])
def test_as_near_as_torch(options, heads, kv_heads, cu):
    lengths = [9, 1, 131, 20, 64]
    options = {**options, **({"prefix": torch.tensor(options["prefix"])} if "prefix" in options else {})}
    close(inputs(lengths, lengths, heads, kv_heads), cu_seqlens=cu(lengths), **options)


@pytest.mark.parametrize("lengths", [[63, 64, 65], [2], [1, 1, 3], [0, 70, 0]], ids=str)
@pytest.mark.parametrize("dims", [(24, 24), (64, 64), (2, 7), (34, 17)], ids=str)
def test_odd_lengths_and_sizes(lengths, dims, cu):
    close(inputs(lengths, lengths, dims=dims), cu_seqlens=cu(lengths))


@pytest.mark.parametrize("options", OPTIONS[:6], ids=str)
def test_queries_are_the_last_tokens_of_a_cache_with_room(options, cu):
    queries, keys, rooms = [70, 1, 2, 1], [150, 200, 67, 64], [151, 203, 67, 70]
    rows = torch.cat([torch.arange(n) + first for n, first in zip(keys, cu(rooms)[:-1], strict=True)])
    q, k, v = inputs(queries, keys)
    close([q, k, v], cu_seqlens=cu(queries), cu_seqlens_k=cu(keys), **options)
    spaced = [x.new_full((sum(rooms), *x.shape[1:]), torch.nan).index_copy(0, rows, x) for x in (k, v)]
    edges = {"cu_seqlens": cu(queries), "cu_seqlens_k": cu(rooms), "lengths_k": torch.tensor(keys)}
    got = attention(q, *spaced, **edges, precision="bf16", **options)
    want = attention(q, k, v, cu_seqlens=cu(queries), cu_seqlens_k=cu(keys), precision="bf16", **options)
    assert torch.equal(got, want)


def test_cross_attention_and_views(cu):
    queries, keys = [5, 1, 70], [2, 9, 3]
    close(inputs(queries, keys), cu_seqlens=cu(queries), cu_seqlens_k=cu(keys), causal=False)
    joined = torch.randn(70, 8, 16)
    close(joined.split((4, 2, 2), dim=1))
    close([x.permute(2, 1, 0).contiguous().permute(2, 1, 0) for x in joined.split((4, 2, 2), dim=1)])


def test_scores_of_any_size_stay_finite(cu):
    q, k, v = (12 * x for x in inputs([280], [280]))
    y = attention(q, k, v, cu_seqlens=cu([200, 80]), precision="bf16")
    want = reference.attention(q.double(), k.double(), v.double(), cu_seqlens=cu([200, 80]))
    assert (y.double() - want).norm() <= 0.05 * want.norm()  # scores of some hundreds, rounded to 2^-9 of their size


def test_a_sequence_gets_the_same_alone_and_in_company(cu):
    lengths = [20, 33, 130, 1, 7]
    given = inputs(lengths, lengths)
    for x in given:
        x[20:53] = torch.nan
    whole = attention(*given, cu_seqlens=cu(lengths), precision="bf16")
    assert whole[20:53].isnan().all()
    for a, b in pairwise(cu(lengths).tolist()):
        assert a == 20 or torch.equal(whole[a:b], attention(*(x[a:b] for x in given), precision="bf16"))


def test_threads_do_not_change_a_bit(cu):
    lengths, threads = [70, 200, 3], torch.get_num_threads()
    given = inputs(lengths, lengths)
    try:
        torch.set_num_threads(1)
        one = attention(*given, cu_seqlens=cu(lengths), precision="bf16")
        torch.set_num_threads(2)
        assert torch.equal(one, attention(*given, cu_seqlens=cu(lengths), precision="bf16"))
    finally:
        torch.set_num_threads(threads)


def test_exact_where_gradients_are_recorded_or_heads_are_odd():
    given = inputs([70], [70])
    recorded = [x.clone().requires_grad_() for x in given]
    assert torch.equal(attention(*recorded, precision="bf16"), attention(*given))
    assert not torch.equal(attention(*given, precision="bf16"), attention(*given))
    odd = inputs([70], [70], dims=(5, 16))
    assert torch.equal(attention(*odd, precision="bf16"), attention(*odd))


def test_unknown_precision():
    with pytest.raises(ConfigError, match="'float32' or 'bf16', not 'half'"):
        attention(*inputs([3], [3]), precision="half")
