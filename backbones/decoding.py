"""Decoding: one token of each sequence through a NeurIPS mLSTM block, natively.

The mathematics is that of ``MLSTMBlock.forward``. Its dozens of small tensors cost more than the reading of the weights
when there is one token, and go over the matrix memory more often than needed when there are many. What is not a plain
block of float32 on a CPU, or records gradients, goes the ordinary way; ``kernels.chosen_backend("decoding")`` tells
whether there is another.

Floor per token: every weight read once, 4 bytes each (2 in bfloat16), and each sequence's C read and written.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from ..kernels import MLSTMState, chosen_backend
from ..kernels.rows import FEW
from ..kernels.step import BlockWeights, mlstm_block_step, mlstm_mixer_step
from ..sequences import PackedBatch
from .layers import BlockLinear, CausalConvolution, HeadNorm, Linear, apply_linear
from .state import ConvolvedState

_PARTS = (  # of a plain block; an adapter, a parametrisation or a hook makes it another
    ("norm", nn.LayerNorm),
    ("up", Linear),
    ("down", Linear),
    ("convolution", CausalConvolution),
    ("query_key", BlockLinear),
    ("value", BlockLinear),
    ("gates", nn.Linear),
    ("head_norm", HeadNorm),
)


def decodes(x: Float[Tensor, "tokens width"], batch: PackedBatch) -> bool:
    """Tell whether a batch with a state is one token of each sequence, and native kernels may run."""
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return False
    if not x.is_cpu or x.dtype != torch.float32 or not 0 < x.shape[0] == len(batch):
        return False
    return chosen_backend("decoding", x.device, x.dtype) == "native" and bool((np.diff(batch.cu_seqlens) == 1).all())


def decode(
    block: nn.Module, x: Float[Tensor, "sequences width"], state: Any, *, reuse_state: bool
) -> tuple[Float[Tensor, "sequences width"], ConvolvedState] | None:
    """Return the residual stream after the block and the block's new state; None where it must go the ordinary way."""
    known = _weights(block)
    if known is None:
        return None
    weights, table, eps, head_eps = known
    past, C, n, m = (_laid_out(part) for part in (state.convolution, *state.cell))
    options = {"past": past, "state": (C, n, m), "head_eps": head_eps, "table": table, "reuse_state": reuse_state}
    if x.shape[0] <= FEW:
        x, past, cell = mlstm_block_step(x, weights, eps=eps, **options)
    else:
        normed = F.layer_norm(x, x.shape[1:], weights.norm, weights.norm_bias, eps)
        mixed, past, cell = mlstm_mixer_step(apply_linear(normed, weights.up, weights.up_bias), weights, **options)
        x = x + apply_linear(mixed, weights.down, weights.down_bias)
    return x, ConvolvedState(MLSTMState(*cell), past)


def _weights(block: nn.Module) -> tuple[BlockWeights, NDArray[np.int64], float, float] | None:
    """Return a block's parameters, where they lie, and the epsilons of its norms, if it is plain and they are readable.

    What was found readable is kept on the block for as long as nothing has moved.
    """
    if not hasattr(block, "decoding") or block.training or block._forward_hooks or block._forward_pre_hooks:
        return None
    modules, found, where = block._modules, [], []
    for name, kind in _PARTS:
        module = modules[name]
        if type(module) is not kind or module._forward_hooks or module._forward_pre_hooks:
            return None
        weight, bias = module._parameters["weight"], module._parameters.get("bias")
        found += (weight, bias)
        where += (weight.data_ptr(), bias.data_ptr() if bias is not None else 0)
    skip = block._parameters["skip"]
    where[-1] = skip.data_ptr()  # a head norm has no bias
    if block.decoding is None or block.decoding[0] != where:
        weights = BlockWeights(*found[:-1], skip)
        if not weights.readable():
            return None
        block.decoding = where, (weights, weights.table(), block.norm.eps, block.head_norm.eps)
    return block.decoding[1]


def _laid_out(part: Tensor) -> Tensor:
    """A part of a state as the native kernels read it."""
    return part if part.dtype == torch.float32 and part.is_contiguous() else part.to(torch.float32).contiguous()
