"""mLSTM against its float64 reference: values, states, every gradient; packing, streaming, direction, isolation."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from processive.errors import ConfigError, ShapeError
from processive.kernels import MLSTMState, available_backends, chosen_backend, mlstm, reference
from torch import Tensor

HEADS, QK, V = 2, 5, 3
ON_CPU = [name for name in available_backends("mlstm") if name != "triton"]
EXACT = [(name, torch.float32 if name == "native" else torch.float64) for name in ON_CPU]
RMS_RATIO = {torch.float64: 1e-10, torch.float32: 1e-5}
NAMES = ["h", "C", "n", "m", "dq", "dk", "dv", "dinput_gate", "dforget_gate", "dC0", "dn0", "dm0"]


def random_inputs(
    tokens: int, dtype: torch.dtype = torch.float64, hard: bool = False, qk_dim: int = QK, v_dim: int = V
) -> list[Tensor]:
    shapes = [
        (tokens, HEADS, qk_dim),
        (tokens, HEADS, qk_dim),
        (tokens, HEADS, v_dim),
        (tokens, HEADS),
        (tokens, HEADS),
    ]
    q, k, v, i, f = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    gates = (6 * i, 8 * f - 4) if hard else (i, f + 1)
    return [x.to(dtype).requires_grad_() for x in (q, k, v, *gates)]


def random_state(sequences: int, dtype: torch.dtype = torch.float64) -> MLSTMState:
    shapes = (sequences, HEADS, QK, V), (sequences, HEADS, QK), (sequences, HEADS)
    return MLSTMState(*(torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes))


def both(inputs, state, grads, **options):
    """Outputs, state and gradients of the kernel and of the reference."""
    leaves = [*inputs, *(state or ())]
    h, last = mlstm(*inputs, initial_state=state, return_state=True, **options)
    options = {name: value for name, value in options.items() if name != "backend"}
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    want_h, want_last = reference.mlstm(*doubles[:5], initial_state=tuple(doubles[5:]) if state else None, **options)
    got = [h, *last, *grads([h, *last], leaves)]
    want = [want_h, *want_last, *grads([want_h, *want_last], doubles)]
    return got, want


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("gate", ["exp", "sigmoid"])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize(("backend", "dtype"), EXACT)
def test_equals_reference(lengths, with_state, gate, reverse, backend, dtype, cu, grads, assert_close):
    inputs = random_inputs(sum(lengths), dtype)
    state = random_state(len(lengths), dtype) if with_state else None
    got, want = both(inputs, state, grads, cu_seqlens=cu(lengths), gate=gate, reverse=reverse, backend=backend)
    assert_close(got, want, RMS_RATIO[dtype], NAMES)


@pytest.mark.parametrize("lengths", [[300], [70, 9, 130]], ids=str)
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize(("hard", "rms_ratio"), [(False, 1e-5), (True, 1e-4)])
@pytest.mark.parametrize("backend", ON_CPU)
def test_float32_equals_reference(lengths, with_state, hard, rms_ratio, backend, cu, grads, assert_close):
    inputs = random_inputs(sum(lengths), torch.float32, hard)
    state = random_state(len(lengths), torch.float32) if with_state else None
    got, want = both(inputs, state, grads, cu_seqlens=cu(lengths), backend=backend)
    assert all(x.dtype == torch.float32 for x in got)
    assert_close(got, want, rms_ratio, NAMES)


@pytest.mark.parametrize("length", [1000, pytest.param(4096, marks=pytest.mark.slow)])
@pytest.mark.parametrize("backend", ON_CPU)
def test_hard_gates_over_a_long_sequence(length, backend, grads, assert_close):
    got, want = both(random_inputs(length, torch.float32, hard=True), None, grads, backend=backend)
    assert_close(got, want, 1e-4, NAMES)


@pytest.mark.parametrize(("qk_dim", "v_dim"), [(1, 1), (16, 16), (20, 36), (64, 128), (33, 7)])
@pytest.mark.parametrize("backend", ON_CPU)
def test_any_head_dimensions(qk_dim, v_dim, backend, cu, grads, assert_close):
    inputs = random_inputs(240, torch.float32, qk_dim=qk_dim, v_dim=v_dim)
    got, want = both(inputs, None, grads, cu_seqlens=cu([150, 67, 23]), backend=backend)
    assert_close(got, want, 1e-5, NAMES[:9])


@pytest.mark.parametrize(("backend", "dtype"), EXACT)
def test_gradient_without_returning_the_state(backend, dtype, grads, assert_close, cu):
    inputs = random_inputs(140, dtype)
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    h = mlstm(*inputs, cu_seqlens=cu([70, 3, 67]), backend=backend)
    want, _ = reference.mlstm(*doubles, cu_seqlens=cu([70, 3, 67]))
    assert_close([h, *grads([h], inputs)], [want, *grads([want], doubles)], RMS_RATIO[dtype])


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("backend", "dtype"), EXACT)
def test_gradient_of_the_final_state_alone(reverse, backend, dtype, grads, assert_close):
    inputs, state = random_inputs(170, dtype), random_state(1, dtype)
    doubles = [x.detach().double().requires_grad_() for x in (*inputs, *state)]
    _, last = mlstm(*inputs, initial_state=state, return_state=True, reverse=reverse, backend=backend)
    _, want = reference.mlstm(*doubles[:5], initial_state=tuple(doubles[5:]), reverse=reverse)
    for part, want_part in zip(last, want, strict=True):
        got_gradients = torch.autograd.grad(part.sum(), [*inputs, *state], retain_graph=True, materialize_grads=True)
        want_gradients = torch.autograd.grad(want_part.sum(), doubles, retain_graph=True, materialize_grads=True)
        assert_close(got_gradients, want_gradients, RMS_RATIO[dtype])


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("backend", ON_CPU)
def test_packed_equals_alone(reverse, backend, cu):
    lengths = [200, 1, 64, 3, 90]
    inputs, edges = random_inputs(sum(lengths), torch.float32), cu(lengths).tolist()
    h, last = mlstm(*inputs, cu_seqlens=cu(lengths), return_state=True, reverse=reverse, backend=backend)
    for s, (start, end) in enumerate(pairwise(edges)):
        alone, state = mlstm(*(x[start:end] for x in inputs), return_state=True, reverse=reverse, backend=backend)
        torch.testing.assert_close(h[start:end], alone, rtol=0, atol=5e-5)
        for part, want in zip(last, state, strict=True):
            torch.testing.assert_close(part[s], want[0], rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("pieces", [[1] * 20, [64, 1, 1, 70, 64, 0, 100], [7, 280, 13]], ids=str)
@pytest.mark.parametrize(("backend", "dtype"), EXACT)
def test_streamed_equals_whole(pieces, backend, dtype, grads, assert_close):
    inputs, state = random_inputs(sum(pieces), dtype), random_state(1, dtype)
    leaves = [*inputs, *state]
    whole, last = mlstm(*inputs, initial_state=state, return_state=True, backend=backend)
    outputs, carried = [], state
    for part in zip(*(x.split(pieces) for x in inputs), strict=True):
        h, carried = mlstm(*part, initial_state=carried, return_state=True, backend=backend)
        outputs.append(h)
    streamed = torch.cat(outputs)
    assert_close(
        [streamed, *carried, *grads([streamed, *carried], leaves)],
        [whole, *last, *grads([whole, *last], leaves)],
        RMS_RATIO[dtype],
    )


def test_reverse_is_flip_run_flip(cu):
    lengths = [70, 5, 1]
    inputs, state = random_inputs(sum(lengths)), random_state(len(lengths))
    flip = torch.cat([torch.arange(a, b).flip(0) for a, b in pairwise(cu(lengths))])
    h, last = mlstm(*inputs, cu_seqlens=cu(lengths), initial_state=state, return_state=True, reverse=True)
    want, want_last = mlstm(*(x[flip] for x in inputs), cu_seqlens=cu(lengths), initial_state=state, return_state=True)
    torch.testing.assert_close(h, want[flip])
    torch.testing.assert_close(last, want_last)


@pytest.mark.parametrize("length", [40, 300])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("backend", ON_CPU)
def test_no_gradient_reaches_the_future(length, reverse, backend):
    inputs, middle = random_inputs(length, torch.float32), length // 2
    h = mlstm(*inputs, reverse=reverse, backend=backend)
    hidden = slice(0, middle) if reverse else slice(middle + 1, None)
    for gradient in torch.autograd.grad(h[middle].sum(), inputs):
        assert (gradient[hidden] == 0).all()
        assert (gradient[middle] != 0).any()


@pytest.mark.parametrize("backend", ON_CPU)
def test_no_gradient_crosses_a_boundary(backend, cu):
    inputs, state = random_inputs(140, torch.float32), random_state(3, torch.float32)
    options = {"cu_seqlens": cu([20, 100, 20]), "initial_state": state, "backend": backend}
    h, last = mlstm(*inputs, return_state=True, **options)
    loss = h[20:120].sum() + sum(part[1].sum() for part in last)
    for gradient in torch.autograd.grad(loss, inputs):
        assert (gradient[:20] == 0).all() and (gradient[120:] == 0).all()
    for gradient in torch.autograd.grad(mlstm(*inputs, **options)[20:120].sum(), state):
        assert (gradient[[0, 2]] == 0).all() and (gradient[1] != 0).any()


@pytest.mark.parametrize("which", range(5), ids=NAMES[4:9])
@pytest.mark.parametrize("backend", ON_CPU)
def test_nan_stays_in_its_sequence(which, backend, cu):
    inputs = [x.detach() for x in random_inputs(250, torch.float32)]
    inputs[which][25] = torch.nan
    h = mlstm(*inputs, cu_seqlens=cu([20, 180, 50]), backend=backend)
    clean = torch.isfinite(h).all(2).all(1)
    assert clean[:20].all() and clean[200:].all() and h[25].isnan().all()
    assert which == 0 or (~clean[26:200]).all()  # a query writes nothing


@pytest.mark.parametrize("backend", ON_CPU)
def test_one_thread_or_two_make_no_difference(backend, cu):
    inputs = random_inputs(400, torch.float32)
    found, threads = [], torch.get_num_threads()
    for number in (1, 2):
        torch.set_num_threads(number)
        h = mlstm(*inputs, cu_seqlens=cu([300, 100]), backend=backend)
        found.append([h, *torch.autograd.grad(h.sum(), inputs)])
    torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


@pytest.mark.parametrize("backend", ON_CPU)
def test_empty_sequences_hand_their_state_on(backend, cu):
    state = random_state(3, torch.float32)
    inputs = random_inputs(5, torch.float32)
    _, last = mlstm(*inputs, cu_seqlens=cu([0, 5, 0]), initial_state=state, return_state=True, backend=backend)
    for part, want in zip(last, state, strict=True):
        assert torch.equal(part[[0, 2]], want[[0, 2]])


@pytest.mark.parametrize("backend", ON_CPU)
def test_a_token_that_writes_and_forgets_nothing_leaves_the_state(backend):
    q, k, v, i, f = (x.detach() for x in random_inputs(4, torch.float32))
    i[2:], f[2:] = -torch.inf, torch.inf
    _, two = mlstm(q[:2], k[:2], v[:2], i[:2], f[:2], return_state=True, backend=backend)
    _, four = mlstm(q, k, v, i, f, return_state=True, backend=backend)
    torch.testing.assert_close(four, two, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ON_CPU)
def test_bfloat16_inputs_keep_float32_gates_and_state(backend, cu):
    inputs = [x.detach() for x in random_inputs(100, torch.bfloat16)]
    h, last = mlstm(*inputs, cu_seqlens=cu([70, 30]), return_state=True, backend=backend)
    want, want_last = reference.mlstm(*inputs, cu_seqlens=cu([70, 30]))
    assert h.dtype == torch.bfloat16 and all(part.dtype == torch.float32 for part in last)
    torch.testing.assert_close(h.double(), want, rtol=2**-8, atol=1e-5)  # one rounding of the result, none before
    for part, want_part in zip(last, want_last, strict=True):
        torch.testing.assert_close(part.double(), want_part, rtol=1e-4, atol=1e-5)


def test_autocast_does_not_reach_inside():
    inputs = [x.detach() for x in random_inputs(80, torch.float32)]
    want = mlstm(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(mlstm(*inputs), want)


def test_wide_heads_in_blocks_of_chunks(cu, grads, assert_close):
    """More than one block of chunks, more than one group, and lengths on both sides of the single chunk."""
    lengths, heads, dim = [500, 20, 180, 33, 57, 1, 150], 3, 48
    tokens = sum(lengths)
    inputs = [torch.randn(tokens, heads, dim, dtype=torch.float64) for _ in range(3)]
    inputs += [torch.randn(tokens, heads, dtype=torch.float64) for _ in range(2)]
    inputs = [x.requires_grad_() for x in inputs]
    got, want = both(inputs, None, grads, cu_seqlens=cu(lengths))
    assert_close(got, want, 1e-10, NAMES[:9])


def test_what_does_not_fit_is_refused(cu):
    inputs = [x.detach() for x in random_inputs(6)]
    with pytest.raises(ShapeError, match="cu_seqlens"):
        mlstm(*inputs, cu_seqlens=torch.tensor([0, 5]))
    with pytest.raises(ShapeError, match="cu_seqlens"):
        mlstm(*inputs, cu_seqlens=torch.tensor([0, 4, 2, 6]))
    with pytest.raises(ShapeError, match=r"initial_state\.C"):
        mlstm(*inputs, cu_seqlens=cu([3, 3]), initial_state=random_state(3))
    with pytest.raises(ConfigError, match="no backend 'cuda'"):
        mlstm(*inputs, backend="cuda")


def test_double_precision_is_not_for_the_native_kernel():
    assert chosen_backend("mlstm", dtype=torch.float64) == "torch"
    if "native" in ON_CPU:
        assert chosen_backend("mlstm") == "native"
        with pytest.raises(ConfigError, match=r"does not take torch.float64 on cpu"):
            mlstm(*random_inputs(3), backend="native")
