"""Linear maps, block-diagonal ones, norms and activations, as they are defined."""

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


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x`` [..., width]."""
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def activation(x: Tensor, kind: str) -> Tensor:
    """``x`` [tokens, inner], or [tokens, 2 inner] of gate and up."""
    gate, up = (x, 1) if kind == "gelu" else x.chunk(2, dim=1)
    share = torch.sigmoid(gate) if kind == "swiglu" else (1 + torch.erf(gate / 2**0.5)) / 2
    return gate * share * up
