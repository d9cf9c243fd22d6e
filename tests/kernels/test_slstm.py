"""sLSTM against its float64 reference: values, states, every gradient; packing, streaming, direction, isolation."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from processive.errors import ConfigError, ShapeError
from processive.kernels import SLSTMState, available_backends, reference, slstm
from torch import Tensor

HEADS, DIM = 2, 3
BACKENDS = [name for name in available_backends("slstm") if name != "triton"]
EXACT = {"torch": (torch.float64, 1e-10), "native": (torch.float32, 1e-5)}  # dtype, and ratio to the reference
NAMES = ["y", "last.y", "last.c", "last.n", "last.m", "dgates", "drecurrent", "dy0", "dc0", "dn0", "dm0"]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def random_inputs(
    tokens: int, dtype: torch.dtype = torch.float64, *, hard: bool = False, heads: int = HEADS, dim: int = DIM
) -> list[Tensor]:
    gates = torch.randn(tokens, 4, heads, dim, dtype=torch.float64)
    recurrent = torch.randn(4, heads, dim, dim, dtype=torch.float64) * 0.5 * (DIM / dim) ** 0.5
    if hard:
        gates[:, :2] *= 8
    return [x.to(dtype).requires_grad_() for x in (gates, recurrent)]


def random_state(
    sequences: int, dtype: torch.dtype = torch.float64, *, heads: int = HEADS, dim: int = DIM
) -> SLSTMState:
    """A state as a run leaves it, n > 0, but one unit that has seen nothing."""
    y, c, n, m = (torch.randn(sequences, heads, dim, dtype=torch.float64) for _ in range(4))
    n = n.abs() + 0.5
    for part in (y, c, n, m):
        part[:, 0, 0] = 0
    return SLSTMState(*(part.to(dtype).requires_grad_() for part in (y, c, n, m)))


def both(inputs, state, grads, *, backend, **options):
    leaves = [*inputs, *(state or ())]
    y, last = slstm(*inputs, initial_state=state, return_state=True, backend=backend, **options)
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    want_y, want_last = reference.slstm(*doubles[:2], initial_state=tuple(doubles[2:]) if state else None, **options)
    return [y, *last, *grads([y, *last], leaves)], [want_y, *want_last, *grads([want_y, *want_last], doubles)]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("with_state", [False, True])
def test_equals_reference(lengths, with_state, reverse, backend, cu, grads, assert_close):
    dtype, rms_ratio = EXACT[backend]
    inputs = random_inputs(sum(lengths), dtype)
    state = random_state(len(lengths), dtype) if with_state else None
    got, want = both(inputs, state, grads, cu_seqlens=cu(lengths), reverse=reverse, backend=backend)
    assert_close(got, want, rms_ratio, NAMES)


@pytest.mark.parametrize(("hard", "rms_ratio"), [(False, 1e-5), (True, 1e-4)])
@pytest.mark.parametrize(("heads", "dim"), [(2, 3), (1, 16), (3, 70)])
def test_float32_equals_reference(hard, rms_ratio, heads, dim, backend, cu, grads, assert_close):
    lengths = [200, 1, 64, 3]
    inputs = random_inputs(sum(lengths), torch.float32, hard=hard, heads=heads, dim=dim)
    state = random_state(len(lengths), torch.float32, heads=heads, dim=dim)
    got, want = both(inputs, state, grads, cu_seqlens=cu(lengths), backend=backend)
    assert all(x.dtype == torch.float32 for x in got)
    assert_close(got, want, rms_ratio, NAMES)


@pytest.mark.parametrize("reverse", [False, True])
def test_more_sequences_than_a_group_takes(reverse, backend, cu, grads, assert_close):
    lengths = [(7 * i) % 11 for i in range(120)]
    inputs, state = random_inputs(sum(lengths), torch.float32, dim=20), random_state(120, torch.float32, dim=20)
    got, want = both(inputs, state, grads, cu_seqlens=cu(lengths), backend=backend, reverse=reverse)
    assert_close(got, want, 1e-5, NAMES)


def test_gradient_without_returning_the_state(backend, cu, grads, assert_close):
    dtype, rms_ratio = EXACT[backend]
    inputs = random_inputs(40, dtype)
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    y = slstm(*inputs, cu_seqlens=cu([30, 3, 7]), backend=backend)
    want, _ = reference.slstm(*doubles, cu_seqlens=cu([30, 3, 7]))
    assert_close([y, *grads([y], inputs)], [want, *grads([want], doubles)], rms_ratio)


def test_gradient_of_the_final_state_alone(backend, assert_close):
    dtype, rms_ratio = EXACT[backend]
    inputs, state = random_inputs(12, dtype), random_state(1, dtype)
    doubles = [x.detach().double().requires_grad_() for x in (*inputs, *state)]
    _, last = slstm(*inputs, initial_state=state, return_state=True, backend=backend)
    _, want = reference.slstm(*doubles[:2], initial_state=tuple(doubles[2:]))
    for part, want_part in zip(last, want, strict=True):
        got_gradients = torch.autograd.grad(part.sum(), [*inputs, *state], retain_graph=True, materialize_grads=True)
        want_gradients = torch.autograd.grad(want_part.sum(), doubles, retain_graph=True, materialize_grads=True)
        assert_close(got_gradients, want_gradients, rms_ratio)


def test_packed_equals_alone(backend, cu):
    lengths = [70, 1, 9]
    (gates, recurrent), edges = random_inputs(sum(lengths), torch.float32), cu(lengths).tolist()
    y = slstm(gates, recurrent, cu_seqlens=cu(lengths), backend=backend)
    for start, end in pairwise(edges):
        alone = slstm(gates[start:end], recurrent, backend=backend)
        torch.testing.assert_close(y[start:end], alone, rtol=0, atol=0 if backend == "native" else 5e-5)


@pytest.mark.skipif("native" not in BACKENDS, reason="not built")
def test_threads_do_not_change_a_bit(cu, grads):
    lengths = [90, 80, 1, 50, 50]
    inputs = random_inputs(sum(lengths), torch.float32, heads=1, dim=48)
    leaves, threads, found = [*inputs, *random_state(5, torch.float32, heads=1, dim=48)], torch.get_num_threads(), []
    for number in (1, 3):
        torch.set_num_threads(number)
        options = {"initial_state": SLSTMState(*leaves[2:]), "return_state": True, "backend": "native"}
        y, last = slstm(*inputs, cu_seqlens=cu(lengths), **options)
        found.append([y, *last, *grads([y, *last], leaves)])
    torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


def test_not_a_number_stays_in_its_sequence(backend, cu):
    gates, recurrent = random_inputs(30, torch.float32)
    with torch.no_grad():
        gates[12] = torch.nan
    y = slstm(gates, recurrent, cu_seqlens=cu([10, 10, 10]), backend=backend)
    (gradient,) = torch.autograd.grad(y.sum(), gates)
    assert y.isnan().flatten(1).any(1).tolist() == [12 <= token < 20 for token in range(30)]
    assert not gradient[:10].isnan().any() and not gradient[20:].isnan().any()


def test_streamed_equals_whole(backend, grads, assert_close):
    dtype, rms_ratio = EXACT[backend]
    pieces = [1, 20, 0, 7]
    (gates, recurrent), state = random_inputs(sum(pieces), dtype), random_state(1, dtype)
    whole, last = slstm(gates, recurrent, initial_state=state, return_state=True, backend=backend)
    outputs, carried = [], state
    for piece in gates.split(pieces):
        y, carried = slstm(piece, recurrent, initial_state=carried, return_state=True, backend=backend)
        outputs.append(y)
    streamed, leaves = torch.cat(outputs), [gates, recurrent, *state]
    assert_close(
        [streamed, *carried, *grads([streamed, *carried], leaves)],
        [whole, *last, *grads([whole, *last], leaves)],
        rms_ratio,
    )


def test_reverse_is_flip_run_flip(backend):
    dtype, _ = EXACT[backend]
    (gates, recurrent), state = random_inputs(30, dtype), random_state(1, dtype)
    y, last = slstm(gates, recurrent, initial_state=state, return_state=True, reverse=True, backend=backend)
    want, want_last = slstm(gates.flip(0), recurrent, initial_state=state, return_state=True, backend=backend)
    torch.testing.assert_close(y, want.flip(0))
    torch.testing.assert_close(last, want_last)


def test_no_gradient_reaches_the_future_or_crosses_a_boundary(backend, cu):
    gates, recurrent = random_inputs(30, EXACT[backend][0])
    y = slstm(gates, recurrent, cu_seqlens=cu([10, 15, 5]), backend=backend)
    (gradient,) = torch.autograd.grad(y[17].sum(), gates)
    assert (gradient[:10] == 0).all() and (gradient[18:] == 0).all() and (gradient[11:18] != 0).any(3).all()


def test_the_extremes_of_every_gate(backend, grads, assert_close):
    """Gates that saturate, leave the range of exp, or shut altogether."""
    values = torch.tensor([-200.0, -90.0, -10.0, -0.625, -1e-3, 0.0, 1e-4, 0.7, 9.5, 89.0, 200.0])
    gates = torch.cartesian_prod(*[values] * 2).repeat(1, 2)[:, None].expand(-1, 1, -1).transpose(1, 2)[..., None]
    gates = gates.contiguous()[torch.randperm(len(gates))].requires_grad_()
    recurrent = torch.zeros(4, 1, 1, 1, requires_grad=True)
    got, want = both([gates, recurrent], None, grads, backend=backend)
    assert_close(got, want, 1e-5, NAMES)


def test_a_fresh_unit_beside_warm_ones_survives_any_input_gate(backend):
    """The stabiliser of a unit that has seen nothing is its input gate, however negative."""
    gates = torch.zeros(3, 4, 1, 2)
    gates[:, 0] = -500.0
    y = slstm(gates + 0.1, torch.zeros(4, 1, 2, 2), backend=backend)
    assert torch.isfinite(y).all() and (y > 0).all()


def test_what_does_not_fit_is_refused(cu):
    gates, recurrent = random_inputs(6)
    with pytest.raises(ShapeError, match="cu_seqlens"):
        slstm(gates, recurrent, cu_seqlens=torch.tensor([0, 5]))
    with pytest.raises(ShapeError, match=r"initial_state\.y"):
        slstm(gates, recurrent, initial_state=random_state(2))
    with pytest.raises(ConfigError, match="no backend"):
        slstm(gates, recurrent, backend="cuda")
