"""Causal convolution against its float64 reference, and against torch's own."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from processive.errors import ConfigError, ShapeError
from processive.kernels import available_backends, causal_conv1d, reference
from torch import Tensor

CHANNELS = 37  # whole vectors and a rest
BACKENDS = available_backends("causal_conv1d")
EXACT = {"torch": (torch.float64, 1e-10), "native": (torch.float32, 1e-5)}  # dtype, and ratio to the reference


def random_inputs(tokens: int, taps: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    shapes = (tokens, CHANNELS), (CHANNELS, taps), (CHANNELS,)
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def both(leaves, grads, backend, activation=None, **options):
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    state = leaves[3] if len(leaves) > 3 else None
    got = causal_conv1d(
        *leaves[:3], initial_state=state, return_state=True, backend=backend, activation=activation, **options
    )
    options["initial_state"] = doubles[3] if len(leaves) > 3 else None
    want = reference.causal_conv1d(*doubles[:3], activation=activation, **options)
    return [*got, *grads(got, leaves)], [*want, *grads(want, doubles)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("taps", [1, 3, 4])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_equals_reference(lengths, backend, taps, with_state, activation, reverse, cu, grads, assert_close):
    dtype, rms_ratio = EXACT[backend]
    leaves = random_inputs(sum(lengths), taps, dtype)
    if with_state:
        leaves.append(torch.randn(len(lengths), taps - 1, CHANNELS, dtype=dtype, requires_grad=True))
    got, want = both(leaves, grads, backend, activation, cu_seqlens=cu(lengths), reverse=reverse)
    assert_close(got, want, rms_ratio, ["y", "last", "dx", "dweight", "dbias", "dstate"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("channels", [1, 300])
def test_float32_over_segments_equals_reference(backend, channels, reverse, cu, grads, assert_close):
    """Sequences longer than what one task takes, edges inside and on its own, and more channels than it takes."""
    lengths = [511, 2, 1100, 0, 3, 300]
    leaves = [
        torch.randn(shape, requires_grad=True) for shape in [(sum(lengths), channels), (channels, 4), (channels,)]
    ]
    leaves.append(torch.randn(len(lengths), 3, channels, requires_grad=True))
    got, want = both(leaves, grads, backend, "silu", cu_seqlens=cu(lengths), reverse=reverse)
    assert all(x.dtype == torch.float32 for x in got)
    assert_close(got, want, 1e-5, ["y", "last", "dx", "dweight", "dbias", "dstate"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_may_lie_apart(backend, assert_close):
    wide, weight = torch.randn(30, 2 * CHANNELS), torch.randn(CHANNELS, 4)
    got = [causal_conv1d(x, weight, backend=backend) for x in (wide[:, CHANNELS:], wide.T[:CHANNELS].T)]
    want = [causal_conv1d(x.contiguous(), weight, backend=backend) for x in wide.split(CHANNELS, 1)]
    assert_close(got, want[::-1], 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_output_alone_has_a_gradient(backend, cu, grads, assert_close):
    dtype, rms_ratio = EXACT[backend]
    leaves = [*random_inputs(9, 4, dtype), torch.randn(3, 3, CHANNELS, dtype=dtype, requires_grad=True)]
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    run = partial(causal_conv1d, *leaves[:3], initial_state=leaves[3], return_state=True, backend=backend)
    want = reference.causal_conv1d(*doubles[:3], initial_state=doubles[3], cu_seqlens=cu([6, 1, 2]))
    for number, want_part in enumerate(want):
        part = run(cu_seqlens=cu([6, 1, 2]))[number]
        assert_close(grads([part], leaves), grads([want_part], doubles), rms_ratio)


@pytest.mark.parametrize("backend", BACKENDS)
def test_not_a_number_stays_in_its_sequence(backend, cu):
    x, weight, bias = random_inputs(30, 4, torch.float32)
    with torch.no_grad():
        x[12] = torch.nan
    y = causal_conv1d(x, weight, bias, cu_seqlens=cu([10, 10, 10]), activation="silu", backend=backend)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert y.isnan().any(1).tolist() == [12 <= token < 16 for token in range(30)]
    assert not dx[:10].isnan().any() and not dx[20:].isnan().any()


@pytest.mark.skipif("native" not in BACKENDS, reason="not built")
def test_threads_do_not_change_a_bit(grads):
    leaves = [torch.randn(shape, requires_grad=True) for shape in [(1500, 300), (300, 4), (300,)]]
    threads, found = torch.get_num_threads(), []
    for number in (1, 3):
        torch.set_num_threads(number)
        y = causal_conv1d(*leaves, activation="silu", backend="native")
        found.append([y, *grads([y], leaves)])
    torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


def test_bfloat16_keeps_its_type():
    x, weight, bias = random_inputs(20, 4, torch.bfloat16)
    y, last = causal_conv1d(x, weight, bias, return_state=True, activation="silu")
    want, _ = reference.causal_conv1d(x, weight, bias, activation="silu")
    assert y.dtype == last.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), want, rtol=0.02, atol=0.02)


def test_equals_torch():
    x, weight, bias = random_inputs(20, 4)
    padded = torch.nn.functional.pad(x.T[None], (3, 0))
    want = torch.nn.functional.conv1d(padded, weight[:, None], bias, groups=CHANNELS)[0].T
    torch.testing.assert_close(causal_conv1d(x, weight, bias), want)
    torch.testing.assert_close(causal_conv1d(x, weight), want - bias)


@pytest.mark.parametrize("backend", BACKENDS)
def test_streamed_equals_whole(backend):
    x, weight, bias = random_inputs(20, 4, EXACT[backend][0])
    run = partial(causal_conv1d, weight=weight, bias=bias, return_state=True, activation="silu", backend=backend)
    whole, last = run(x)
    outputs, state = [], torch.zeros(1, 3, CHANNELS, dtype=x.dtype)
    for piece in x.split([1, 2, 0, 12, 5]):
        y, state = run(piece, initial_state=state)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs), whole)
    torch.testing.assert_close(state, last)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient_reaches_the_future_or_crosses_a_boundary(backend, cu):
    x, weight, bias = random_inputs(30, 4, EXACT[backend][0])
    y = causal_conv1d(x, weight, bias, cu_seqlens=cu([10, 15, 5]), backend=backend)
    (gradient,) = torch.autograd.grad(y[11].sum(), x)
    assert (gradient[:10] == 0).all() and (gradient[12:] == 0).all() and (gradient[10:12] != 0).all()


def test_what_does_not_fit_is_refused(cu):
    x, weight, bias = random_inputs(6, 4)
    with pytest.raises(ShapeError, match="cu_seqlens"):
        causal_conv1d(x, weight, bias, cu_seqlens=torch.tensor([0, 7]))
    with pytest.raises(ShapeError, match="initial_state"):
        causal_conv1d(x, weight, bias, initial_state=torch.zeros(2, 3, CHANNELS, dtype=x.dtype))
    with pytest.raises(ShapeError, match="at least one tap"):
        causal_conv1d(x, weight[:, :0], bias)
    with pytest.raises(ConfigError, match="no backend"):
        causal_conv1d(x, weight, bias, backend="cuda")
