"""The Triton kernels against the float64 references: on a GPU where there is one, else interpreted (conftest.py)."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from processive.errors import ConfigError
from processive.kernels import MLSTMState, SLSTMState, available_backends, chosen_backend, mlstm, reference, slstm
from torch import Tensor
from torch.nn.functional import logsigmoid

if "triton" not in available_backends("mlstm"):
    pytest.skip("Triton is not installed", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, on what a mask then drops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS, QK, V = 2, 20, 36
NAMES = ["h", "C", "n", "m", "dq", "dk", "dv", "dinput_gate", "dforget_gate", "dC0", "dn0", "dm0"]
SLSTM_NAMES = ["y", "last.y", "last.c", "last.n", "last.m", "dgates", "drecurrent", "dy0", "dc0", "dn0", "dm0"]


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory holds NaN, so that nothing passes by having found zeros."""

    def poisoning(allocate):
        def allocated(*args, **kwargs):
            x = allocate(*args, **kwargs)
            return x.fill_(torch.nan if x.is_floating_point() else -7)

        return allocated

    monkeypatch.setattr(torch, "empty", poisoning(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoning(torch.empty_like))
    monkeypatch.setattr(Tensor, "new_empty", poisoning(Tensor.new_empty))


def random_inputs(tokens: int, dtype=torch.float32, hard=False, heads=HEADS, qk=QK, v=V) -> list[Tensor]:
    shapes = [(tokens, heads, qk), (tokens, heads, qk), (tokens, heads, v), (tokens, heads), (tokens, heads)]
    q, k, values, i, f = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    gates = (6 * i, 8 * f - 4) if hard else (i, f + 1)
    return [x.to(dtype).requires_grad_() for x in (q, k, values, *gates)]


def random_state(sequences: int) -> MLSTMState:
    shapes = (sequences, HEADS, QK, V), (sequences, HEADS, QK), (sequences, HEADS)
    return MLSTMState(*(torch.randn(shape).requires_grad_() for shape in shapes))


def run(inputs, state=None, **options):
    """Run the mLSTM on the device; the inputs and what comes back live on the CPU."""
    state = None if state is None else MLSTMState(*(x.to(DEVICE) for x in state))
    h, last = mlstm(
        *(x.to(DEVICE) for x in inputs), initial_state=state, return_state=True, backend="triton", **options
    )
    return h.cpu(), MLSTMState(*(x.cpu() for x in last))


def both(inputs, state, grads, **options):
    leaves = [*inputs, *(state or ())]
    h, last = run(inputs, state, **options)
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    want_h, want_last = reference.mlstm(*doubles[:5], initial_state=tuple(doubles[5:]) if state else None, **options)
    got = [h, *last, *grads([h, *last], leaves)]
    want = [want_h, *want_last, *grads([want_h, *want_last], doubles)]
    return got, want


@pytest.mark.parametrize("kernel", ["mlstm", "slstm"])
def test_triton_is_for_gpus(kernel):
    assert "triton" in available_backends(kernel)
    assert chosen_backend(kernel, "cuda", torch.bfloat16) == "triton"
    assert chosen_backend(kernel, "cpu", torch.float32) != "triton"
    assert chosen_backend(kernel, "cuda", torch.float64) == "torch"


def test_float64_is_refused():
    with pytest.raises(ConfigError, match=r"does not take torch\.float64"):
        mlstm(*(x.double() for x in random_inputs(3)), backend="triton")


@pytest.mark.parametrize(("with_state", "gate", "reverse"), [(False, "exp", True), (True, "sigmoid", False)])
def test_mlstm_equals_reference(lengths, with_state, gate, reverse, cu, grads, assert_close):
    inputs = random_inputs(sum(lengths))
    state = random_state(len(lengths)) if with_state else None
    got, want = both(inputs, state, grads, cu_seqlens=cu(lengths), gate=gate, reverse=reverse)
    assert all(x.dtype == torch.float32 for x in got)
    assert_close(got, want, 1e-5, NAMES)


@pytest.mark.parametrize(("lengths", "reverse"), [([300], False), ([20, 1, 133, 17], True)], ids=str)
def test_mlstm_with_hard_gates(lengths, reverse, cu, grads, assert_close):
    inputs, state = random_inputs(sum(lengths), hard=True), random_state(len(lengths))
    assert_close(*both(inputs, state, grads, cu_seqlens=cu(lengths), reverse=reverse), 1e-4, NAMES)


def test_mlstm_heads_wider_than_a_block(cu, grads, assert_close):
    """Two blocks of keys' dimensions and three of values', more chunks than one."""
    inputs = random_inputs(150, heads=1, qk=70, v=130)
    assert_close(*both(inputs, None, grads, cu_seqlens=cu([10, 140])), 1e-5, NAMES)


def test_mlstm_chunks_of_many_blocks(grads, assert_close):
    inputs = random_inputs(280, heads=1, qk=128, v=128)
    assert_close(*both(inputs, None, grads), 1e-5, NAMES)


def test_mlstm_without_returning_the_state(cu, grads, assert_close):
    inputs = random_inputs(140, heads=1)
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    for lengths in ([70, 3, 67], [140]):  # chunks that start with nothing, and such that carry
        h = mlstm(*(x.to(DEVICE) for x in inputs), cu_seqlens=cu(lengths), backend="triton").cpu()
        want, _ = reference.mlstm(*doubles, cu_seqlens=cu(lengths))
        assert_close([h, *grads([h], inputs)], [want, *grads([want], doubles)], 1e-5)


def test_mlstm_gradient_of_the_final_state_alone(assert_close):
    inputs, state = random_inputs(140), random_state(1)
    doubles = [x.detach().double().requires_grad_() for x in (*inputs, *state)]
    _, last = run(inputs, state)
    _, want = reference.mlstm(*doubles[:5], initial_state=tuple(doubles[5:]))
    for part, want_part in zip(last, want, strict=True):
        got = torch.autograd.grad(part.sum(), [*inputs, *state], retain_graph=True, materialize_grads=True)
        wanted = torch.autograd.grad(want_part.sum(), doubles, retain_graph=True, materialize_grads=True)
        assert_close(got, wanted, 1e-5)


def test_gradient_of_a_last_m_that_comes_from_the_first(assert_close):
    """Where no input gate ever won, d m_last goes to the initial m and to every forget gate."""
    inputs, state = random_inputs(5), random_state(1)
    state = state._replace(m=(state.m.detach() + 50).requires_grad_())
    doubles = [x.detach().double().requires_grad_() for x in (*inputs, *state)]
    _, last = run(inputs, state)
    _, want = reference.mlstm(*doubles[:5], initial_state=tuple(doubles[5:]))
    wanted = [inputs[4], state.m], [doubles[4], doubles[7]]
    got, expected = (torch.autograd.grad(x.m.sum() if hasattr(x, "m") else x[2].sum(), y) for x, y in
                     zip((last, want), wanted, strict=True))  # fmt: skip
    assert (got[1] == 1).all() and (got[0] != 0).all()
    assert_close(got, expected, 1e-5)


@pytest.mark.parametrize("reverse", [False, True])
def test_mlstm_packed_equals_alone(reverse, cu):
    lengths = [140, 1, 64]
    inputs, edges = [x.detach() for x in random_inputs(sum(lengths), heads=1)], cu(lengths).tolist()
    h, last = run(inputs, cu_seqlens=cu(lengths), reverse=reverse)
    for s, (start, end) in enumerate(pairwise(edges)):
        alone, state = run([x[start:end] for x in inputs], reverse=reverse)
        torch.testing.assert_close(h[start:end], alone, rtol=0, atol=5e-5)
        for part, want in zip(last, state, strict=True):
            torch.testing.assert_close(part[s], want[0], rtol=1e-4, atol=5e-5)


def test_mlstm_streamed_equals_whole(grads, assert_close):
    pieces = [1, 40, 0, 1, 90]
    inputs, state = random_inputs(sum(pieces)), random_state(1)
    leaves = [*inputs, *state]
    whole, last = run(inputs, state)
    outputs, carried = [], state
    for part in zip(*(x.split(pieces) for x in inputs), strict=True):
        h, carried = run(part, carried)
        outputs.append(h)
    streamed = torch.cat(outputs)
    assert_close(
        [streamed, *carried, *grads([streamed, *carried], leaves)],
        [whole, *last, *grads([whole, *last], leaves)],
        1e-5,
        NAMES,
    )


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize(("qk", "v"), [(QK, V), (7, 300)])
def test_mlstm_step_equals_reference(qk, v, with_state, cu, assert_close):
    """One token for each of many sequences, without gradients: the fused kernel."""
    inputs = [x.detach() for x in random_inputs(5, qk=qk, v=v)]
    shapes = (5, HEADS, qk, v), (5, HEADS, qk), (5, HEADS)
    state = MLSTMState(*(torch.randn(shape) for shape in shapes)) if with_state else None
    h, last = run(inputs, state, cu_seqlens=cu([1] * 5))
    want, want_last = reference.mlstm(*inputs, cu_seqlens=cu([1] * 5), initial_state=state)
    assert_close([h, *last], [want, *want_last], 1e-5, NAMES[:4])


def test_nothing_crosses_a_boundary(cu):
    inputs, state = random_inputs(140), random_state(3)
    h, last = run(inputs, state, cu_seqlens=cu([20, 100, 20]))
    loss = h[20:120].sum() + sum(part[1].sum() for part in last)
    for gradient in torch.autograd.grad(loss, [*inputs, *state], retain_graph=True)[:5]:
        assert (gradient[:20] == 0).all() and (gradient[120:] == 0).all() and (gradient[20:120] != 0).any()
    for gradient in torch.autograd.grad(loss, state):
        assert (gradient[[0, 2]] == 0).all() and (gradient[1] != 0).any()
    poisoned = [x.detach().clone() for x in inputs]
    for x in poisoned:
        x[:20] = torch.nan
    again, _ = run(poisoned, state, cu_seqlens=cu([20, 100, 20]))
    assert again[:20].isnan().all() and torch.equal(again[20:], h[20:])


@pytest.mark.parametrize("reverse", [False, True])
def test_no_gradient_reaches_the_future(reverse):
    inputs, middle = random_inputs(140, heads=1), 70
    h, _ = run(inputs, reverse=reverse)
    hidden = slice(0, middle) if reverse else slice(middle + 1, None)
    for gradient in torch.autograd.grad(h[middle].sum(), inputs):
        assert (gradient[hidden] == 0).all() and (gradient[middle] != 0).any()


def test_a_token_that_writes_and_forgets_nothing_leaves_the_state():
    q, k, v, i, f = (x.detach() for x in random_inputs(4))
    i[2:], f[2:] = -torch.inf, torch.inf
    _, two = run([q[:2], k[:2], v[:2], i[:2], f[:2]])
    h, four = run([q, k, v, i, f])
    assert torch.isfinite(h).all()
    torch.testing.assert_close(four, two, rtol=0, atol=0)


def parallel_form(q, k, v, input_gate, forget_gate):
    """The mLSTM as torch would compute it: products in the dtype of q, k and v, the rest in float32."""
    decay = logsigmoid(forget_gate.float()).cumsum(0)
    exponent = (decay[:, None] - decay + input_gate.float()).permute(2, 0, 1)
    seen = torch.ones(len(q), len(q), dtype=torch.bool).tril()
    exponent = exponent.masked_fill(~seen, -torch.inf)
    m = torch.maximum(exponent.amax(-1), decay.T).detach()
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    P = (q @ k.mT).float() * q.shape[-1] ** -0.5 * torch.exp(exponent - m[..., None])
    N = torch.maximum(P.sum(-1).abs(), torch.exp(-m))
    return ((P.to(v.dtype) @ v).float() / N[..., None]).transpose(0, 1).to(v.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_are_as_good_as_torchs(dtype, grads):
    """At most twice the error of torch in the same dtype; gates and state stay float32."""
    inputs = random_inputs(150, dtype)
    h, last = run(inputs)
    assert h.dtype == dtype and all(part.dtype == torch.float32 for part in last)
    ours = [h, *grads([h], inputs)]
    own = parallel_form(*inputs)
    torchs = [own, *grads([own], inputs)]
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    want, want_last = reference.mlstm(*doubles)
    truth = [want, *grads([want], doubles)]

    def error(x: Tensor, y: Tensor) -> Tensor:
        return (x.double() - y).square().mean().sqrt()

    for name, x, y, z in zip([NAMES[0], *NAMES[4:9]], ours, torchs, truth, strict=True):
        assert error(x, z) <= 2 * error(y, z), f"{name}: {error(x, z):.2e}, torch's own {error(y, z):.2e}"
    eps = torch.finfo(dtype).eps
    for part, want_part in zip(last, want_last, strict=True):
        assert error(part, want_part) <= eps * want_part.square().mean().sqrt()


def slstm_inputs(tokens: int, dim: int, hard: bool = False) -> list[Tensor]:
    gates, recurrent = torch.randn(tokens, 4, HEADS, dim), torch.randn(4, HEADS, dim, dim) * dim**-0.5
    if hard:
        gates[:, :2] *= 8
    return [gates.requires_grad_(), recurrent.requires_grad_()]


def slstm_state(sequences: int, dim: int) -> SLSTMState:
    """A state as a run leaves it, n > 0, but one unit that has seen nothing."""
    y, c, n, m = (torch.randn(sequences, HEADS, dim) for _ in range(4))
    n = n.abs() + 0.5
    for part in (y, c, n, m):
        part[:, 0, 0] = 0
    return SLSTMState(*(part.requires_grad_() for part in (y, c, n, m)))


def both_slstm(inputs, state, grads, **options):
    leaves = [*inputs, *(state or ())]
    first = None if state is None else SLSTMState(*(x.to(DEVICE) for x in state))
    y, last = slstm(
        *(x.to(DEVICE) for x in inputs), initial_state=first, return_state=True, backend="triton", **options
    )
    y, last = y.cpu(), [x.cpu() for x in last]
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    want_y, want_last = reference.slstm(*doubles[:2], initial_state=tuple(doubles[2:]) if state else None, **options)
    return [y, *last, *grads([y, *last], leaves)], [want_y, *want_last, *grads([want_y, *want_last], doubles)]


@pytest.mark.parametrize(("with_state", "reverse"), [(False, False), (True, True)])
@pytest.mark.parametrize("lengths", [[1], [20], [0, 5, 0, 9, 1], [2, 0, 1] * 7, [0, 0], []], ids=str)
def test_slstm_equals_reference(lengths, with_state, reverse, cu, grads, assert_close):
    inputs = slstm_inputs(sum(lengths), 5)
    state = slstm_state(len(lengths), 5) if with_state else None
    got, want = both_slstm(inputs, state, grads, cu_seqlens=cu(lengths), reverse=reverse)
    assert_close(got, want, 1e-5, SLSTM_NAMES)


def test_slstm_with_hard_gates(cu, grads, assert_close):
    got, want = both_slstm(slstm_inputs(60, 20, True), slstm_state(2, 20), grads, cu_seqlens=cu([40, 20]))
    assert_close(got, want, 1e-4, SLSTM_NAMES)


def test_slstm_heads_wider_than_a_block(cu, grads, assert_close):
    got, want = both_slstm(slstm_inputs(12, 130), slstm_state(3, 130), grads, cu_seqlens=cu([7, 1, 4]))
    assert_close(got, want, 1e-5, SLSTM_NAMES)


def test_slstm_gradient_of_the_final_state_alone(assert_close):
    inputs, state = slstm_inputs(12, 5), slstm_state(1, 5)
    doubles = [x.detach().double().requires_grad_() for x in (*inputs, *state)]
    first = SLSTMState(*(x.to(DEVICE) for x in state))
    _, last = slstm(*(x.to(DEVICE) for x in inputs), initial_state=first, return_state=True, backend="triton")
    _, want = reference.slstm(*doubles[:2], initial_state=tuple(doubles[2:]))
    for part, want_part in zip(last, want, strict=True):
        got = torch.autograd.grad(part.sum(), [*inputs, *state], retain_graph=True, materialize_grads=True)
        wanted = torch.autograd.grad(want_part.sum(), doubles, retain_graph=True, materialize_grads=True)
        assert_close(got, wanted, 1e-5)


def test_a_fresh_unit_survives_any_input_gate():
    gates = torch.zeros(3, 4, 1, 2)
    gates[:, 0] = -500.0
    y = slstm((gates + 0.1).to(DEVICE), torch.zeros(4, 1, 2, 2, device=DEVICE), backend="triton")
    assert torch.isfinite(y).all() and (y > 0).all()


def test_the_kernels_compile_for_a_gpu():
    """What the interpreter takes the compiler may refuse, and the compiler needs no GPU."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, Path(__file__).with_name("compile_triton.py"), "80", "bfloat16", "64", "2", "state"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
