"""Rotary positions: each pair of channels turns by an angle that grows with the position.

    angle_p,j = p * base ** (-2 j / dim),   j = 0 .. dim/2 - 1
    (a, b)  ->  (a cos - b sin, b cos + a sin)

``style="half"`` pairs channel j with j + dim/2 (GPT-NeoX, Llama, ESM-2), ``"interleaved"`` 2 j with 2 j + 1 (RoFormer).

Source: Su et al. 2021, RoFormer (arXiv:2104.09864), equation 34.
Floor: 3 FLOP and 8 bytes per channel in float32 (read, write); the angles are shared by the heads.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import ConfigError, ShapeError
from .packing import expect_shape, gate_dtype


def rotary(
    x: Float[Tensor, "tokens heads dim"],
    positions: Int[Tensor, " tokens"],
    *,
    base: float | int = 10000.0,
    style: Literal["half", "interleaved"] = "half",
) -> Float[Tensor, "tokens heads dim"]:
    """Turn ``x`` by its ``positions``; the product of two turned vectors depends on their distance only.

    The angles are computed in float64, since a position of 10^6 times a float32 frequency is wrong in the second
    decimal; the rotation runs in float32 (float64 for float64 input).

    Raises:
        ShapeError: ``dim`` is odd, or there is not one position per token.
        ConfigError: unknown ``style``, or ``base`` is not positive.
    """
    dim = x.shape[-1]
    if x.ndim != 3 or dim % 2:
        raise ShapeError("x", tuple(x.shape), "[tokens, heads, dim] with an even dim")
    expect_shape("positions", positions, (len(x),))
    if style not in ("half", "interleaved"):
        raise ConfigError(f"Rotary style is 'half' or 'interleaved', not {style!r}.")
    if base <= 0:
        raise ConfigError(f"The rotary base must be positive; it is {base}.")
    precise = torch.float32 if x.device.type == "mps" else torch.float64  # Apple GPUs have no float64
    frequencies = float(base) ** (-torch.arange(0, dim, 2, device=x.device, dtype=precise) / dim)
    angles = positions.to(precise)[:, None, None] * frequencies
    dtype = gate_dtype(x.dtype)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    if style == "half":
        a, b = x.chunk(2, -1)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    else:
        a, b = x[..., 0::2], x[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    return turned.to(x.dtype)
