"""sLSTM against its float64 reference: values, states, every gradient; packing, streaming, direction, isolation."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from processive.errors import ConfigError, ShapeError
from processive.kernels import SLSTMState, reference, slstm
from torch import Tensor

HEADS, DIM = 2, 3
NAMES = ["y", "last.y", "last.c", "last.n", "last.m", "dgates", "drecurrent", "dy0", "dc0", "dn0", "dm0"]


def random_inputs(tokens: int, dtype: torch.dtype = torch.float64, hard: bool = False) -> list[Tensor]:
    gates = torch.randn(tokens, 4, HEADS, DIM, dtype=torch.float64)
    recurrent = torch.randn(4, HEADS, DIM, DIM, dtype=torch.float64) * 0.5
    if hard:
        gates[:, :2] *= 8
    return [x.to(dtype).requires_grad_() for x in (gates, recurrent)]


def random_state(sequences: int, dtype: torch.dtype = torch.float64) -> SLSTMState:
    """A state as a run leaves it, n > 0, but one unit that has seen nothing."""
    y, c, n, m = (torch.randn(sequences, HEADS, DIM, dtype=torch.float64) for _ in range(4))
    n = n.abs() + 0.5
    for part in (y, c, n, m):
        part[:, 0, 0] = 0
    return SLSTMState(*(part.to(dtype).requires_grad_() for part in (y, c, n, m)))


def both(inputs, state, grads, **options):
    leaves = [*inputs, *(state or ())]
    y, last = slstm(*inputs, initial_state=state, return_state=True, **options)
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    want_y, want_last = reference.slstm(*doubles[:2], initial_state=tuple(doubles[2:]) if state else None, **options)
    return [y, *last, *grads([y, *last], leaves)], [want_y, *want_last, *grads([want_y, *want_last], doubles)]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("with_state", [False, True])
def test_equals_reference(lengths, with_state, reverse, cu, grads, assert_close):
    inputs = random_inputs(sum(lengths))
    state = random_state(len(lengths)) if with_state else None
    got, want = both(inputs, state, grads, cu_seqlens=cu(lengths), reverse=reverse)
    assert_close(got, want, 1e-10, NAMES)


@pytest.mark.parametrize(("hard", "rms_ratio"), [(False, 1e-5), (True, 1e-4)])
def test_float32_equals_reference(hard, rms_ratio, cu, grads, assert_close):
    lengths = [200, 1, 64, 3]
    state = random_state(len(lengths), torch.float32)
    got, want = both(random_inputs(sum(lengths), torch.float32, hard), state, grads, cu_seqlens=cu(lengths))
    assert all(x.dtype == torch.float32 for x in got)
    assert_close(got, want, rms_ratio, NAMES)


def test_gradient_without_returning_the_state(cu, grads, assert_close):
    inputs = random_inputs(40)
    doubles = [x.detach().clone().requires_grad_() for x in inputs]
    y, (want, _) = slstm(*inputs, cu_seqlens=cu([30, 3, 7])), reference.slstm(*doubles, cu_seqlens=cu([30, 3, 7]))
    assert_close([y, *grads([y], inputs)], [want, *grads([want], doubles)], 1e-10)


def test_gradient_of_the_final_state_alone(assert_close):
    inputs, state = random_inputs(12), random_state(1)
    doubles = [x.detach().clone().requires_grad_() for x in (*inputs, *state)]
    _, last = slstm(*inputs, initial_state=state, return_state=True)
    _, want = reference.slstm(*doubles[:2], initial_state=tuple(doubles[2:]))
    for part, want_part in zip(last, want, strict=True):
        got_gradients = torch.autograd.grad(part.sum(), [*inputs, *state], retain_graph=True, materialize_grads=True)
        want_gradients = torch.autograd.grad(want_part.sum(), doubles, retain_graph=True, materialize_grads=True)
        assert_close(got_gradients, want_gradients, 1e-10)


def test_packed_equals_alone(cu):
    lengths = [70, 1, 9]
    (gates, recurrent), edges = random_inputs(sum(lengths), torch.float32), cu(lengths).tolist()
    y = slstm(gates, recurrent, cu_seqlens=cu(lengths))
    for start, end in pairwise(edges):
        torch.testing.assert_close(y[start:end], slstm(gates[start:end], recurrent), rtol=0, atol=5e-5)


def test_streamed_equals_whole(grads, assert_close):
    pieces = [1, 20, 0, 7]
    (gates, recurrent), state = random_inputs(sum(pieces)), random_state(1)
    whole, last = slstm(gates, recurrent, initial_state=state, return_state=True)
    outputs, carried = [], state
    for piece in gates.split(pieces):
        y, carried = slstm(piece, recurrent, initial_state=carried, return_state=True)
        outputs.append(y)
    streamed, leaves = torch.cat(outputs), [gates, recurrent, *state]
    assert_close(
        [streamed, *carried, *grads([streamed, *carried], leaves)],
        [whole, *last, *grads([whole, *last], leaves)],
        1e-10,
    )


def test_reverse_is_flip_run_flip():
    (gates, recurrent), state = random_inputs(30), random_state(1)
    y, last = slstm(gates, recurrent, initial_state=state, return_state=True, reverse=True)
    want, want_last = slstm(gates.flip(0), recurrent, initial_state=state, return_state=True)
    torch.testing.assert_close(y, want.flip(0))
    torch.testing.assert_close(last, want_last)


def test_no_gradient_reaches_the_future_or_crosses_a_boundary(cu):
    gates, recurrent = random_inputs(30)
    y = slstm(gates, recurrent, cu_seqlens=cu([10, 15, 5]))
    (gradient,) = torch.autograd.grad(y[17].sum(), gates)
    assert (gradient[:10] == 0).all() and (gradient[18:] == 0).all() and (gradient[11:18] != 0).any(3).all()


def test_a_fresh_unit_beside_warm_ones_survives_any_input_gate():
    """The stabiliser of a unit that has seen nothing is its input gate, however negative."""
    gates = torch.zeros(3, 4, 1, 2)
    gates[:, 0] = -500.0
    y = slstm(gates + 0.1, torch.zeros(4, 1, 2, 2))
    assert torch.isfinite(y).all() and (y > 0).all()


def test_what_does_not_fit_is_refused(cu):
    gates, recurrent = random_inputs(6)
    with pytest.raises(ShapeError, match="cu_seqlens"):
        slstm(gates, recurrent, cu_seqlens=torch.tensor([0, 5]))
    with pytest.raises(ShapeError, match=r"initial_state\.y"):
        slstm(gates, recurrent, initial_state=random_state(2))
    with pytest.raises(ConfigError, match="no backend"):
        slstm(gates, recurrent, backend="cuda")
