"""Block-diagonal maps of one input: q and k of an mLSTM, in one pass over memory.

    y_m[b] = W_mb x[b]        dx[b] = sum_m W_mb^T dy_m[b]        dW_mb = sum_t dy_m[b] x[b]^T

Floor per token and channel: 4 + 4 maps bytes forward and 12 + 8 maps with the backward, in float32; with blocks of 4,
8 maps FLOP forward, three times that with the backward. So memory bounds it. Reached on two Zen 4 cores (45 GB/s), q, k
and v of 3,200 tokens, width 1,024: 24-27 GB/s forward, 13 backward (which reads x and dy once for dx, once for dW).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..errors import ConfigError, ShapeError
from . import native
from .backends import choose_backend

MERGED_BLOCK = 16


def block_linear(
    x: Float[Tensor, "tokens width"], weight: Float[Tensor, "maps blocks out in"], *, backend: str = "auto"
) -> tuple[Float[Tensor, "tokens width"], ...]:
    """Return one output per map; the channels of a block lie side by side.

    The native kernel has blocks of 4 in float32, the width a multiple of 16; "auto" leaves the rest to torch.

    Raises:
        ShapeError: ``weight`` does not fit ``x``, or its blocks are not square.
        ConfigError: unknown ``backend``, or the native kernel is asked for and does not have it.
    """
    _, blocks, block, _ = weight.shape
    if weight.shape[3] != block or x.shape[1] != blocks * block:
        raise ShapeError("x, weight", (tuple(x.shape), tuple(weight.shape)), "[tokens, width], square blocks of width")
    chosen = choose_backend("block_linear", backend, x.device, x.dtype)
    fits = block == 4 and not x.shape[1] % 16 and x.dtype == weight.dtype == torch.float32
    if backend == "native" and not fits:
        raise ConfigError("The native block_linear takes float32, blocks of 4 and a width that 16 divides.")
    if chosen == "torch" or not fits:
        return _torch(x, weight)
    outputs: tuple[Tensor, ...] = _BlockLinear.apply(x, weight)  # type: ignore[no-untyped-call]
    return outputs


def _torch(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    weight = _merged(weight)
    blocks = weight.shape[1]
    return torch.einsum("tbi,mboi->tmbo", x.view(len(x), blocks, x.shape[1] // blocks), weight).flatten(2).unbind(1)


def _merged(weight: Tensor) -> Tensor:
    """Neighbouring blocks as one, zeros between them: products of 16 channels run three times as fast as of 4."""
    maps, blocks, block, _ = weight.shape
    merge = math.gcd(blocks, max(MERGED_BLOCK // block, 1))
    if merge == 1:
        return weight
    grouped = weight.view(maps, blocks // merge, merge, block, 1, block)
    diagonal = torch.eye(merge, dtype=grouped.dtype, device=grouped.device).view(merge, 1, merge, 1)
    return (grouped * diagonal).reshape(maps, blocks // merge, merge * block, merge * block)


class _BlockLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        if x.stride(1) != 1:
            x = x.contiguous()
        ctx.save_for_backward(x, weight)
        outputs = tuple(native.empty(*x.shape) for _ in weight)
        _run((x,), weight.permute(0, 3, 1, 2), outputs, row=x.stride(0))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        dys = tuple(dy.contiguous() for dy in dys)
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            dx = native.empty(*x.shape)
            _run(dys, weight.permute(0, 2, 1, 3), (dx,), row=x.shape[1])
        if ctx.needs_input_grad[1]:
            maps, blocks, _, _ = weight.shape
            by_input = native.empty(maps, 4, blocks, 4)
            run = native.function("block_linear_weight", "iii pi pp")
            dys_at = _addresses(dys)
            run(*x.shape, maps, x.data_ptr(), x.stride(0), dys_at.data_ptr(), by_input.data_ptr())
            dweight = by_input.permute(0, 2, 3, 1)
        return dx, dweight


def _run(inputs: tuple[Tensor, ...], weight: Tensor, outputs: tuple[Tensor, ...], *, row: int) -> None:
    """Each output is the sum of the inputs' maps; ``weight`` [maps, in, blocks, out]."""
    weight, inputs_at, outputs_at = weight.contiguous(), _addresses(inputs), _addresses(outputs)
    run = native.function("block_linear", "iiii pi pp")
    counts = (*outputs[0].shape, len(inputs), len(outputs))
    run(*counts, inputs_at.data_ptr(), row, weight.data_ptr(), outputs_at.data_ptr())


def _addresses(tensors: tuple[Tensor, ...]) -> Tensor:
    return torch.tensor([tensor.data_ptr() for tensor in tensors], dtype=torch.int64)
