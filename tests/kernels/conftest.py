"""Helpers shared by the kernel tests, as fixtures because test folders are not packages."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec

import pytest
import torch
from processive import kernels  # noqa: F401 - with its types checked
from torch import Tensor

LENGTHS = [[1], [63], [64], [65], [1, 1, 1], [200, 1, 64, 3], [0, 5, 0], [0, 0], []]


def import_triton_kernels() -> None:
    """Import the Triton kernels as they stand: Triton reads their source, which checks of types would hide from it."""
    checks = [finder for finder in sys.meta_path if type(finder).__module__.startswith("jaxtyping")]
    for finder in checks:
        sys.meta_path.remove(finder)
    import_module("processive.kernels.triton")
    sys.meta_path[:0] = checks


if find_spec("triton"):
    import_triton_kernels()


@pytest.fixture(params=LENGTHS, ids=str)
def lengths(request: pytest.FixtureRequest) -> list[int]:
    """Sequence lengths that hurt."""
    return request.param


@pytest.fixture(autouse=True)
def _fresh_memory_is_nan() -> Iterator[None]:
    """Let torch fill fresh memory with NaN, so that what a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def cumulative(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def gradients(outputs: Sequence[Tensor], inputs: Sequence[Tensor], seed: int = 1) -> list[Tensor]:
    """Gradients of every input for random gradients on every output; zeros for an input that was not used."""
    generator = torch.Generator().manual_seed(seed)
    upstream = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype) for y in outputs]
    pairs = [(y, g) for y, g in zip(outputs, upstream, strict=True) if y.requires_grad]
    if not pairs:
        return [torch.zeros_like(x) for x in inputs]
    found = torch.autograd.grad(
        [y for y, _ in pairs], list(inputs), [g for _, g in pairs], allow_unused=True, materialize_grads=True
    )
    return list(found)


def compare(
    got: Sequence[Tensor], want: Sequence[Tensor], rms_ratio: float, names: Sequence[str] | None = None
) -> None:
    """Demand RMS(got - want) <= rms_ratio * RMS(want) for each tensor; where want is all zero, got must be."""
    assert len(got) == len(want)
    for number, (x, y) in enumerate(zip(got, want, strict=True)):
        name = names[number] if names else str(number)
        assert x.shape == y.shape, f"{name}: shape {tuple(x.shape)}, expected {tuple(y.shape)}"
        if not y.numel():
            continue
        error, size = (x.double() - y.double()).square().mean().sqrt(), y.double().square().mean().sqrt()
        assert torch.isfinite(x).all(), f"{name} is not finite"
        assert error <= rms_ratio * size, f"{name}: RMS ratio {error / size:.2e}, allowed {rms_ratio:.0e}"


@pytest.fixture
def cu() -> Callable[[Sequence[int]], Tensor]:
    return cumulative


@pytest.fixture
def grads() -> Callable[..., list[Tensor]]:
    return gradients


@pytest.fixture
def assert_close() -> Callable[..., None]:
    return compare
