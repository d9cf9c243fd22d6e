"""Rotary positions, one pair of channels after the other; see ``kernels/rotary.py``."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary(x: Tensor, positions: Tensor, *, base: float | int = 10000.0, style: str = "half") -> Tensor:
    """Return ``x`` turned by its positions, in float64."""
    x, positions, dim = x.double(), positions.double(), x.shape[-1]
    channels: list[Tensor] = [x[..., 0]] * dim
    for j in range(dim // 2):
        first, second = (j, j + dim // 2) if style == "half" else (2 * j, 2 * j + 1)
        angle = (positions * base ** (-2 * j / dim))[:, None]
        channels[first] = x[..., first] * torch.cos(angle) - x[..., second] * torch.sin(angle)
        channels[second] = x[..., second] * torch.cos(angle) + x[..., first] * torch.sin(angle)
    return torch.stack(channels, -1) if dim else x
