"""Rotary positions: each pair of channels turns by an angle that grows with the position.

    angle_p,j = p * base ** (-2 j / dim),   j = 0 .. dim/2 - 1
    (a, b)  ->  (a cos - b sin, b cos + a sin)

``style="half"`` pairs channel j with j + dim/2 (GPT-NeoX, Llama, ESM-2), ``"interleaved"`` 2 j with 2 j + 1 (RoFormer).

Source: Su et al. 2021, RoFormer (arXiv:2104.09864), equation 34.
Floor: 3 FLOP and 8 bytes per channel in float32 (read, write); the angles are shared by the heads. Native, 16 heads of
64, 2 Zen 4 cores (23 GB/s copying): 28-34 GB/s on 4,096 tokens, 16 GB/s on 35,840, whose output is new memory each time
(torch's clone: 5). The torch form makes nine passes and runs at 1-3 GB/s.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from ..errors import ConfigError, ShapeError
from . import native
from .backends import choose_backend
from .packing import expect_shape, gate_dtype

PRECISIONS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def rotary(
    x: Float[Tensor, "tokens heads dim"],
    positions: Int[Tensor, " tokens"],
    *,
    base: float | int = 10000.0,
    style: Literal["half", "interleaved"] = "half",
    precision: str | None = None,
    backend: str = "auto",
) -> Float[Tensor, "tokens heads dim"]:
    """Turn ``x`` by its ``positions``; the product of two turned vectors depends on their distance only.

    The angles are computed in float64, since a position of 10^6 times a float32 frequency is wrong in the second
    decimal; the rotation runs in float32 (float64 for float64 input). ``precision`` is for models that were trained
    with coarser frequencies, see ``rotary_frequencies``.

    Raises:
        ShapeError: ``dim`` is odd, or there is not one position per token.
        ConfigError: unknown ``style``, ``precision`` or ``backend``, or ``base`` is not positive.
    """
    dim = x.shape[-1]
    if x.ndim != 3 or dim % 2:
        raise ShapeError("x", tuple(x.shape), "[tokens, heads, dim] with an even dim")
    expect_shape("positions", positions, (len(x),))
    if style not in ("half", "interleaved"):
        raise ConfigError(f"Rotary style is 'half' or 'interleaved', not {style!r}.")
    if base <= 0:
        raise ConfigError(f"The rotary base must be positive; it is {base}.")
    frequencies = rotary_frequencies(dim, float(base), precision)
    if choose_backend("rotary", backend, x.device, x.dtype) == "native":
        turns = np.zeros(dim // 2 + native.MOST_LANES)  # as vectors read beyond the end
        turns[: dim // 2] = frequencies / (2 * np.pi)
        turned: Tensor = _Rotary.apply(  # type: ignore[no-untyped-call]
            x.float(), positions.long().contiguous(), _Turn(turns, style == "interleaved", 1.0)
        )
        return turned.to(x.dtype)
    return _turned(x, positions, frequencies, style)


@lru_cache(maxsize=64)
def rotary_frequencies(dim: int, base: float, precision: str | None = None) -> NDArray[np.float64]:
    """Return the angle per position of each pair of channels, float64 [dim / 2].

    Most published code computes them in float32, and ESM-2's stand in its checkpoints in float16. ``precision`` names
    the dtype whose values they had: the last bits of an angle grow with the position.
    """
    if precision is None:
        return np.asarray(base ** (-np.arange(0, dim, 2) / dim))
    if precision not in PRECISIONS:
        raise ConfigError(f"Rotary frequencies are {', '.join(PRECISIONS)} or None, not {precision!r}.")
    computed = 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim))
    rounded: NDArray[np.float64] = computed.to(PRECISIONS[precision]).double().numpy()
    return rounded


class _Turn(NamedTuple):
    """Full turns per position of each pair, how channels pair, and 1 to turn, -1 to turn back."""

    turns: NDArray[np.float64]
    interleaved: bool
    direction: float


class _Rotary(torch.autograd.Function):
    """The gradient is turned back by the same angles."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, positions: Tensor, turn: _Turn) -> Tensor:
        ctx.save_for_backward(positions)
        ctx.turn = turn
        x = x if x.stride(2) == 1 else x.contiguous()
        y = native.empty(*x.shape)
        native.function("rotary", "pppp iiiiii f")(
            x.data_ptr(),
            positions.data_ptr(),
            turn.turns.ctypes.data,
            y.data_ptr(),
            *(*x.shape, *x.stride()[:2], int(turn.interleaved), turn.direction),
        )
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (positions,) = ctx.saved_tensors
        back = ctx.turn._replace(direction=-ctx.turn.direction)
        return _Rotary.apply(dy, positions, back), None, None  # type: ignore[no-untyped-call]


def _turned(x: Tensor, positions: Tensor, frequencies: NDArray[np.float64], style: str) -> Tensor:
    """Turn by cosines and sines of all tokens, in torch."""
    precise = torch.float32 if x.device.type == "mps" else torch.float64  # Apple GPUs have no float64
    angles = positions.to(precise)[:, None, None] * torch.tensor(frequencies, dtype=precise, device=x.device)
    dtype = gate_dtype(x.dtype)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    if style == "half":
        a, b = x.chunk(2, -1)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    else:
        a, b = x[..., 0::2], x[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    return turned.to(x.dtype)
