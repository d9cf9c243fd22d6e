"""Linear maps, block-diagonal ones, and the gated norm, as they are defined."""

from __future__ import annotations

import torch
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``weight`` [outputs, inputs]."""
    y = x @ weight.mT
    return y if bias is None else y + bias


def block_linear(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """``weight`` [maps, blocks, out, in]."""
    return tuple(x @ torch.block_diag(*blocks).mT for blocks in weight)  # type: ignore[no-untyped-call]


def gated_norm(
    h: Tensor,
    weight: Tensor,
    gate: Tensor,
    *,
    skip: Tensor | None = None,
    skip_weight: Tensor | None = None,
    activation: str = "silu",
    eps: float = 1e-5,
) -> Tensor:
    """``h`` [tokens, heads, head_dim]."""
    centred = h - h.mean(-1, keepdim=True)
    y = (weight * centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()).flatten(1)
    if skip is not None and skip_weight is not None:
        y = y + skip * skip_weight
    return y * torch.sigmoid(gate) * (gate if activation == "silu" else 1)
