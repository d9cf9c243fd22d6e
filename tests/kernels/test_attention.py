"""Attention against its float64 reference: masks, shared heads, cache, packing, isolation;
every backend, its outputs allocated as NaN."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from processive.errors import ConfigError, ShapeError
from processive.kernels import attention, available_backends, reference
from torch import Tensor

DIM, V = 5, 7
OPTIONS = [
    {},
    {"causal": False},
    {"window": 4},
    {"causal": False, "window": 4},
    {"window": 70},
    {"window": 1},
    {"scale": 0.3},
]
BACKENDS = available_backends("attention")
NAMES = ["y", "dq", "dk", "dv"]


def random_inputs(
    queries: int, keys: int, heads: int, kv_heads: int, dtype: torch.dtype = torch.float64, dims=(DIM, V)
) -> list[Tensor]:
    dim, v_dim = dims
    shapes = (queries, heads, dim), (keys, kv_heads, dim), (keys, kv_heads, v_dim)
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def both(inputs, grads, backend="auto", **options):
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    y, want = attention(*inputs, backend=backend, **options), reference.attention(*doubles, **options)
    return [y, *grads([y], inputs)], [want, *grads([want], doubles)]


@pytest.fixture(params=BACKENDS)
def check(request, grads, assert_close):
    """Compare a backend with the reference: in float64 to 1e-10 where it has that, in float32 to 1e-5."""
    backend = request.param

    def run(queries, keys, heads, kv_heads, dims=(DIM, V), **options):
        for dtype, ratio in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
            if dtype == torch.float64 and backend != "torch":
                continue
            inputs = random_inputs(sum(queries), sum(keys), heads, kv_heads, dtype, dims)
            got, want = both(inputs, grads, backend, **options)
            assert got[0].dtype == dtype
            assert_close(got, want, ratio, NAMES)

    return run


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (3, 1)])
def test_equals_reference(check, options, heads, kv_heads, cu):
    lengths = [9, 1, 0, 20, 9, 3]
    check(lengths, lengths, heads, kv_heads, cu_seqlens=cu(lengths), **options)


@pytest.mark.parametrize("lengths", [[1], [63, 64, 65], [1, 1, 1], [130, 81], [0, 0], []], ids=str)
@pytest.mark.parametrize("dims", [(16, 32), (33, 17), (2, 100)], ids=str)
def test_equals_reference_at_odd_lengths_and_sizes(check, lengths, dims, cu):
    check(lengths, lengths, 2, 1, dims, cu_seqlens=cu(lengths))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(
    ("queries", "keys"), [([1, 3, 0, 4, 1, 3], [6, 9, 5, 4, 6, 9]), ([70, 1, 2, 1], [150, 200, 67, 64])], ids=str
)
def test_queries_are_the_last_tokens_of_a_cache(check, queries, keys, options, cu):
    check(queries, keys, 4, 2, cu_seqlens=cu(queries), cu_seqlens_k=cu(keys), **options)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(
    ("queries", "keys"),
    [([1, 3, 0, 4, 1, 3], [6, 9, 5, 4, 6, 9]), ([1, 1, 1], [33, 0, 70]), ([70, 2], [150, 2])],
    ids=str,
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_room_behind_the_keys_is_not_read(backend, queries, keys, options, cu, grads, assert_close):
    """Keys with room behind each sequence give what they give end to end, and the room gets no gradient."""
    queries, room = [n if keys[s] else 0 for s, n in enumerate(queries)], [3, 0, 17, 1, 0, 2][: len(keys)]
    q, k, v = random_inputs(sum(queries), sum(keys), 4, 2, torch.float32)
    want = reference.attention(q, k, v, cu_seqlens=cu(queries), cu_seqlens_k=cu(keys), **options)
    want = [want, *grads([want], [q, k, v])]

    def with_room(x: Tensor) -> Tensor:
        parts = zip(x.detach().split(keys), room, strict=True)
        spaced = torch.cat([torch.cat((part, part.new_full((n, *x.shape[1:]), torch.nan))) for part, n in parts])
        return spaced.requires_grad_()

    edges = cu([a + b for a, b in zip(keys, room, strict=True)])
    rows = torch.cat([torch.arange(n) + first for n, first in zip(keys, edges[:-1], strict=True)])
    spaced = [q, with_room(k), with_room(v)]
    y = attention(
        *spaced, cu_seqlens=cu(queries), cu_seqlens_k=edges, lengths_k=torch.tensor(keys), backend=backend, **options
    )
    dq, dk, dv = grads([y], spaced)
    assert_close([y, dq, dk[rows], dv[rows]], want, 1e-5, NAMES)
    for gradient in (dk, dv):
        gradient[rows] = 0
        assert not gradient.any()


@pytest.mark.parametrize("prefix", [None, [2, 5]], ids=str)
@pytest.mark.parametrize(("queries", "keys"), [([5, 1, 70, 0], [2, 9, 3, 4]), ([130, 1], [1, 1])], ids=str)
def test_cross_attention_sees_every_key(check, queries, keys, prefix, cu):
    lead = None if prefix is None else torch.tensor((prefix * 2)[: len(keys)])
    check(queries, keys, 4, 2, cu_seqlens=cu(queries), cu_seqlens_k=cu(keys), causal=False, prefix=lead)


@pytest.mark.parametrize("dims", [(DIM, V), (64, 64), (48, 33)], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 6), (6, 3), (10, 10)])
def test_one_query_each_with_shared_and_many_heads(check, dims, heads, kv_heads, cu):
    queries, keys = [1, 1, 1], [40, 1, 131]
    check(queries, keys, heads, kv_heads, dims, cu_seqlens=cu(queries), cu_seqlens_k=cu(keys))


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("causal", [True, False])
def test_prefix_sees_itself_both_ways(check, window, causal, cu):
    lengths = [6, 6, 6, 1, 12, 150]
    prefix = torch.tensor([0, 4, 6, 1, 5, 90])
    check(lengths, lengths, 2, 2, cu_seqlens=cu(lengths), prefix=prefix, window=window, causal=causal)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_of_any_size_stay_finite(backend, cu, grads, assert_close):
    inputs = [(x.detach() * 12).requires_grad_() for x in random_inputs(280, 280, 4, 2, torch.float32)]
    got, want = both(inputs, grads, backend, cu_seqlens=cu([200, 80]))
    assert_close(got, want, 1e-5, NAMES)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_may_be_views(backend, grads, assert_close):
    joined = torch.randn(70, 8, DIM)
    parts = [x.requires_grad_() for x in joined.split((4, 2, 2), dim=1)]
    got, want = both(parts, grads, backend)
    assert_close(got, want, 1e-5, NAMES)
    turned = [x.detach().permute(2, 1, 0).contiguous().permute(2, 1, 0).requires_grad_() for x in parts]
    assert_close(both(turned, grads, backend)[0], want, 1e-5, NAMES)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_is_as_good_as_torch(backend):
    q, k, v = (x.detach() for x in random_inputs(90, 90, 2, 2, torch.bfloat16, (16, 16)))
    want = reference.attention(q, k, v)
    plain = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1) for x in (q, k, v)), is_causal=True
    ).transpose(0, 1)
    y = attention(q, k, v, backend=backend)
    assert y.dtype == torch.bfloat16
    assert (y.double() - want).norm() <= 2 * (plain.double() - want).norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_sequence(backend, cu):
    lengths = [20, 10, 70, 1, 1]
    inputs = random_inputs(sum(lengths), sum(lengths), 2, 2, torch.float32)
    with torch.no_grad():
        for x in inputs:
            x[20:30] = torch.nan
            x[100] = torch.nan
    y = attention(*inputs, cu_seqlens=cu(lengths), backend=backend)
    gradients = torch.autograd.grad(y, inputs, torch.ones_like(y))
    for x in (y, *gradients):
        assert torch.isfinite(x[:20]).all() and torch.isfinite(x[30:100]).all() and torch.isfinite(x[101]).all()
    assert y[20:30].isnan().all() and y[100].isnan().all()


@pytest.mark.skipif("native" not in BACKENDS, reason="native kernels were not built")
def test_threads_do_not_change_a_bit(cu):
    lengths = [100, 3, 64, 1, 30]
    inputs = random_inputs(sum(lengths), sum(lengths), 4, 2, torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            y = attention(*inputs, cu_seqlens=cu(lengths), backend="native")
            results.append([y, *torch.autograd.grad(y, inputs, torch.ones_like(y))])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_decoding_with_a_cache_equals_the_whole(backend, cu):
    q, k, v = random_inputs(12, 12, 2, 2, torch.float32)
    whole = attention(q, k, v, backend=backend)
    pieces = [
        attention(q[a:b], k[:b], v[:b], cu_seqlens=cu([b - a]), cu_seqlens_k=cu([b]), backend=backend)
        for a, b in [(0, 5), (5, 6), (6, 12)]
    ]
    torch.testing.assert_close(torch.cat(pieces), whole)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_equals_alone(backend, cu):
    lengths = [30, 1, 8, 90]
    inputs, edges = random_inputs(sum(lengths), sum(lengths), 2, 2, torch.float32), cu(lengths).tolist()
    y = attention(*inputs, cu_seqlens=cu(lengths), backend=backend)
    for start, end in pairwise(edges):
        alone = attention(*(x[start:end] for x in inputs), backend=backend)
        torch.testing.assert_close(y[start:end], alone, rtol=0, atol=5e-5)


@pytest.mark.parametrize(("backend", "dtype"), [("torch", torch.float64), *((b, torch.float32) for b in BACKENDS)])
def test_no_gradient_reaches_the_future_or_crosses_a_boundary(backend, dtype, cu):
    inputs = random_inputs(30, 30, 2, 2, dtype)
    y = attention(*inputs, cu_seqlens=cu([10, 15, 5]), backend=backend)
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
    with pytest.raises(ShapeError, match="keys for at least"):
        attention(q, k, v, cu_seqlens=cu([4, 2]), cu_seqlens_k=cu([6, 0]), causal=False)
    for lengths_k in ([4], [5, 2], [-1, 2]):
        with pytest.raises(ShapeError, match="lengths_k"):
            attention(q, k, v, cu_seqlens=cu([4, 2]), lengths_k=torch.tensor(lengths_k))
    with pytest.raises(ShapeError, match="divides the 3"):
        attention(q[:, :3], k, v)
    with pytest.raises(ConfigError, match="window is 0"):
        attention(q, k, v, window=0)
    with pytest.raises(ConfigError, match="no backend"):
        attention(q, k, v, backend="flash")
