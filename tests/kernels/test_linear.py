"""Linear maps: every backend against the float64 reference, and the choice between them."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from jaxtyping import TypeCheckError
from processive.errors import ConfigError, ShapeError
from processive.kernels import (
    available_backends,
    backends,
    chosen_backend,
    cpu,
    fused_linear,
    linear,
    native,
    reference,
)
from torch import Tensor

# tokens, inputs, outputs: single ones, odd ones, more than a tile, a panel, a block and a piece along k
SHAPES = [(1, 1, 1), (3, 5, 7), (7, 1030, 65), (130, 33, 200), (200, 64, 16), (1100, 3, 100), (97, 600, 2)]
BF16_BACKENDS = [name for name in available_backends("linear") if name != "native" or native.has_bfloat16()]


def random_inputs(tokens: int, inputs: int, outputs: int) -> list[Tensor]:
    shapes = (tokens, inputs), (outputs, inputs), (outputs,)
    return [torch.randn(shape).requires_grad_() for shape in shapes]


def doubled(leaves: list[Tensor]) -> list[Tensor]:
    return [x.detach().double().requires_grad_() for x in leaves]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("backend", available_backends("linear"))
def test_equals_reference(backend, with_bias, shape, grads, assert_close):
    leaves = random_inputs(*shape)[: 2 + with_bias]
    doubles = doubled(leaves)
    y, want = linear(*leaves, backend=backend), reference.linear(*doubles)
    assert_close([y, *grads([y], leaves)], [want, *grads([want], doubles)], 1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", BF16_BACKENDS)
def test_bf16_rounds_operands_and_nothing_else(backend, shape, grads, assert_close):
    leaves = random_inputs(*shape)
    y = linear(*leaves, backend=backend, precision="bf16")
    found = [y, *grads([y], leaves)]
    assert all(x.dtype == torch.float32 for x in found)
    doubles, theirs = doubled(leaves), [x.detach().bfloat16().requires_grad_() for x in leaves]
    want_y, torch_y = reference.linear(*doubles), F.linear(*theirs)
    want, torchs = [want_y, *grads([want_y], doubles)], [torch_y, *grads([torch_y], theirs)]
    for mine, other, truth in zip(found, torchs, want, strict=True):
        error = (other.double() - truth).square().mean().sqrt()
        assert (mine.double() - truth).square().mean().sqrt() <= 2 * error + 1e-12
    if backend == "native":  # float32 sums: exact products of rounded operands
        rounded = [x.detach().bfloat16().double() for x in leaves[:2]]
        assert_close([y], [reference.linear(*rounded, leaves[2].double())], 1e-6)


@pytest.mark.parametrize("backend", available_backends("linear"))
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_inputs_may_lie_in_any_order(backend, precision, grads, assert_close):
    if backend == "native" and precision == "bf16" and not native.has_bfloat16():
        pytest.skip("no bfloat16 here")
    x, weight = torch.randn(2, 90, 130), torch.randn(33, 130)
    whole = linear(x, weight, backend=backend, precision=precision)
    views = [
        (x.transpose(0, 1).contiguous().transpose(0, 1), weight),
        (torch.cat((x, x), dim=-1)[..., :130], weight.t().contiguous().t()),
        (torch.stack((x, x), dim=-1)[..., 0], torch.stack((weight, weight), dim=-1)[..., 1]),
    ]
    for other, other_weight in views:
        assert_close([linear(other, other_weight, backend=backend, precision=precision)], [whole], 1e-6)
    leaf = x.clone().requires_grad_()
    (expanded,) = torch.autograd.grad(linear(leaf, weight, backend=backend).sum(), leaf)  # a gradient without strides
    assert_close([expanded], [weight.sum(0).expand(x.shape)], 1e-5)


@pytest.mark.parametrize("backend", ["auto", *available_backends("linear")])
@pytest.mark.parametrize("shape", [(0, 3, 4), (5, 0, 4), (5, 3, 0)], ids=str)
def test_empty(backend, shape):
    x, weight, bias = random_inputs(*shape)
    y = linear(x, weight, bias, backend=backend)
    assert torch.equal(y, bias.expand(shape[0], shape[2]))
    y.sum().backward()
    assert weight.grad is not None and (weight.grad == 0).all()


@pytest.mark.parametrize("backend", available_backends("linear"))
def test_second_derivatives(backend, assert_close):
    def second(function):
        torch.manual_seed(0)
        x, weight, bias = random_inputs(20, 6, 5)
        first = torch.autograd.grad(torch.tanh(function(x, weight, bias)).sum(), (x, weight), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), (x, weight, bias))

    assert_close(second(lambda *leaves: linear(*leaves, backend=backend)), second(F.linear), 1e-5)


def test_can_be_transformed():
    x, weight, bias = (leaf.detach() for leaf in random_inputs(200, 6, 5))
    gradient = torch.func.grad(lambda w: linear(x, w, bias).square().sum())(weight)
    torch.testing.assert_close(gradient, torch.func.grad(lambda w: F.linear(x, w, bias).square().sum())(weight))


def test_can_be_compiled():
    """In a process of its own: the compiler cannot read the functions that check annotations in tests."""
    code = """
import torch
from processive.kernels import linear
x, weight, bias = torch.randn(200, 6), torch.randn(5, 6), torch.randn(5)
compiled = torch.compile(lambda x: linear(x, weight, bias), backend="eager", fullgraph=True)
torch.testing.assert_close(compiled(x), torch.nn.functional.linear(x, weight, bias))
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_the_same_whatever_the_threads(precision):
    x, weight = torch.randn(500, 700), torch.randn(300, 700)
    before = torch.get_num_threads()
    chosen = chosen_backend("linear", dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(linear(x, weight, backend=chosen, precision=precision))
    torch.set_num_threads(before)
    if chosen == "native":
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    torch.testing.assert_close(results[0], results[2])


def test_autocast_does_not_reach_inside():
    x, weight, _ = random_inputs(200, 6, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for backend in available_backends("linear"):
            assert linear(x, weight, backend=backend).dtype == torch.float32
    assert linear(x.double(), weight.double()).dtype == torch.float64
    assert linear(x.bfloat16(), weight.bfloat16()).dtype == torch.bfloat16


def test_nan_stays():
    x, weight, _ = (leaf.detach() for leaf in random_inputs(200, 6, 5))
    x[7, 3] = float("nan")
    for precision in ("float32", "bf16"):
        bad = linear(x, weight, precision=precision).isnan()
        assert bad[7].all() and bad.sum() == 5


def test_the_choice_follows_the_processor(monkeypatch):
    def choice(vendor: str, flags: set[str], dtype: torch.dtype = torch.float32) -> str:
        monkeypatch.setattr(cpu, "vendor", lambda: vendor)
        monkeypatch.setattr(cpu, "flags", lambda: frozenset(flags))
        return chosen_backend("linear", dtype=dtype)

    monkeypatch.setattr(native, "variant", lambda: "avx512")
    monkeypatch.setattr(native, "has_bfloat16", lambda: True)
    monkeypatch.setattr(backends, "_has_onednn", lambda: True)
    assert choice("AuthenticAMD", {"avx2"}) == "native"
    assert choice("GenuineIntel", {"avx2", "avx512f"}) == "torch"
    assert choice("AuthenticAMD", {"avx2"}, torch.bfloat16) == "native"
    assert choice("GenuineIntel", {"amx_bf16"}, torch.bfloat16) == "torch"
    assert choice("AuthenticAMD", {"avx2"}, torch.float64) == "torch"
    monkeypatch.setattr(native, "variant", lambda: None)
    assert choice("AuthenticAMD", {"avx2"}) == "onednn"
    monkeypatch.setattr(backends, "_has_onednn", lambda: False)
    assert choice("AuthenticAMD", {"avx2"}) == "torch"
    assert chosen_backend("linear", device="cuda") == "torch"


def test_without_the_private_operator_there_is_no_onednn(monkeypatch):
    backends._has_onednn.cache_clear()
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda x, w, b, *_: x @ w.t(), raising=False)
    assert not backends._has_onednn()  # it exists and does something else
    backends._has_onednn.cache_clear()
    with pytest.raises(ConfigError, match="onednn"):
        linear(torch.ones(2, 3), torch.ones(4, 3), backend="onednn")
    monkeypatch.undo()
    backends._has_onednn.cache_clear()


@pytest.mark.parametrize("shape", [*SHAPES, (0, 5, 3), (9, 36, 7), (20, 1030, 65), (33, 64, 128)], ids=str)
@pytest.mark.parametrize("gelu", [None, "gelu"])
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("full", [False, True])
@torch.no_grad()
def test_what_follows_is_fused(full, narrow, gelu, shape, assert_close):
    """A narrow weight rounds ``x`` too, so the truth is made of rounded operands."""
    x, weight, bias = random_inputs(*shape)
    residual = torch.randn(shape[0], shape[2]) if full else None
    weight = weight.detach() / shape[1] ** 0.5
    weight, seen = (weight.bfloat16(), x.bfloat16()) if narrow else (weight, x)
    got = fused_linear(x, weight, bias if full else None, activation=gelu, residual=residual)
    want = reference.linear(seen.double(), weight.double(), bias.double() if full else None)
    want = want if gelu is None else reference.activation(want, "gelu")
    assert got.dtype == torch.float32
    # torch's own product may round to bfloat16 once more, where the native one does not serve
    rounded = narrow and not (native.has_bfloat16() and shape[1] % 2 == 0 and not 32 < shape[0] < 128)
    assert_close([got], [want if residual is None else want + residual], 1e-2 if rounded else 2e-6)


def test_what_follows_has_gradients(assert_close, grads):
    leaves = [*random_inputs(150, 40, 24), torch.randn(150, 24).requires_grad_()]
    doubles = doubled(leaves)

    def run(x, weight, bias, residual, function):
        return function(x, weight, bias, activation="gelu", residual=residual)

    got = run(*leaves, fused_linear)
    x, weight, bias, residual = doubles
    want = F.gelu(reference.linear(x, weight, bias)) + residual
    assert_close([got, *grads([got], leaves)], [want, *grads([want], doubles)], 2e-6)
    with torch.no_grad():
        torch.testing.assert_close(run(*leaves, fused_linear), got)


@torch.no_grad()
def test_operands_apart_and_other_dtypes_are_read_right(assert_close):
    x, weight = torch.randn(300, 40)[:, ::2], torch.randn(20, 140).t()
    residual = torch.randn(140, 300).t()
    want = reference.linear(x.double(), weight.double()) + residual
    assert_close([fused_linear(x, weight, residual=residual)], [want], 2e-6)
    assert_close([fused_linear(x, weight.bfloat16(), residual=residual)], [want], 1e-2)
    assert_close([fused_linear(x.double(), weight.double(), residual=residual.double())], [want], 1e-12)
    assert fused_linear(x.bfloat16(), weight.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(ConfigError, match="gelu"):
        fused_linear(x, weight, activation="silu")
    with pytest.raises((ShapeError, TypeCheckError)):  # the latter where annotations are checked, as in these tests
        fused_linear(x, weight[:, :3])


def test_what_does_not_fit_is_refused():
    x, weight, bias = random_inputs(4, 3, 2)
    with pytest.raises(ShapeError, match="x, weight, bias"):
        linear(x, weight[:, :2])
    with pytest.raises(ShapeError, match="x, weight, bias"):
        linear(x, weight, bias[:1])
    with pytest.raises(ConfigError, match="precision"):
        linear(x, weight, precision="fp16")
    for backend in available_backends("linear"):
        if backend != "torch":
            with pytest.raises(ConfigError, match=backend):
                linear(x.double(), weight.double(), backend=backend)
