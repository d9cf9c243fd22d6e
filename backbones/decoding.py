"""Decoding: one token of each sequence through a NeurIPS mLSTM block in three native calls.

The mathematics is that of ``MLSTMBlock.forward``. Its dozens of small tensors cost more than the reading of the weights
when there is one token, and more passes over the matrix memory than the one that is needed when there are many. What is
not a plain block of float32 on a CPU, or records gradients, goes the ordinary way; ``kernels.chosen_backend("decoding")``
tells whether there is this one at all.

Floor per token step: every weight read once, 4 bytes each (2 in bfloat16), and each sequence's C read and written.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..kernels import MLSTMState, chosen_backend, native
from ..kernels.rows import FEW, WEIGHTS, Norm, native_rows
from ..kernels.step import MixerWeights, mlstm_mixer_step
from ..sequences import PackedBatch
from .layers import BlockLinear, CausalConvolution, HeadNorm, Linear, apply_linear
from .state import ConvolvedState

_PARTS = (  # of a plain block; an adapter, a parametrisation or a hook makes it another
    ("norm", nn.LayerNorm, ("weight", "bias")),
    ("up", Linear, ("weight", "bias")),
    ("down", Linear, ("weight", "bias")),
    ("convolution", CausalConvolution, ("weight", "bias")),
    ("query_key", BlockLinear, ("weight", "bias")),
    ("value", BlockLinear, ("weight", "bias")),
    ("gates", nn.Linear, ("weight", "bias")),
    ("head_norm", HeadNorm, ("weight",)),
)
_NARROW = (2, 4)  # numbers, among the parameters, of those that may be bfloat16


def decodes(x: Float[Tensor, "tokens width"], batch: PackedBatch) -> bool:
    """Tell whether a batch with a state is one token of each sequence, and native kernels may run."""
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return False
    if not x.is_cpu or x.dtype != torch.float32 or not 0 < len(x) == len(batch):
        return False
    return chosen_backend("decoding", x.device, x.dtype) == "native" and batch.max_length == 1


def decode(
    block: nn.Module, x: Float[Tensor, "sequences width"], state: ConvolvedState, *, reuse_state: bool
) -> tuple[Float[Tensor, "sequences width"], ConvolvedState] | None:
    """Return the residual stream after the block and the block's new state; None where it must go the ordinary way."""
    parameters = _parameters(block)
    if parameters is None:
        return None
    norm_weight, norm_bias, up, up_bias, down, down_bias, *rest = parameters
    eps = block.norm.eps
    few = len(x) <= FEW
    if few:
        norm = Norm(norm_weight, norm_bias, eps)
        inner = native_rows(x, up, up_bias, norm=norm, residual=None, out=x.new_empty(len(x), len(up)))
    else:
        inner = apply_linear(F.layer_norm(x, norm_weight.shape, norm_weight, norm_bias, eps), up, up_bias)
    old = (_laid_out(part) for part in (state.convolution, *state.cell))
    past, *cell = old
    mixed, past, cell = mlstm_mixer_step(
        inner, MixerWeights(*rest), past=past, state=cell, eps=block.head_norm.eps, reuse_state=reuse_state
    )
    if few:
        x = native_rows(mixed, down, down_bias, norm=None, residual=x, out=torch.empty_like(x))
    else:
        x = x + apply_linear(mixed, down, down_bias)
    return x, ConvolvedState(MLSTMState(*cell), past)


def _parameters(block: nn.Module) -> list[Tensor | None] | None:
    """Return what the native kernels read of a block, if it is a plain one that they can read."""
    checked = getattr(block, "checked", None)
    if checked is None or block.training or block._forward_hooks or block._forward_pre_hooks:
        return None
    modules, found = block._modules, []
    for name, kind, parameters in _PARTS:
        module = modules[name]
        if type(module) is not kind or module._forward_hooks or module._forward_pre_hooks:
            return None
        found += [module._parameters.get(parameter) for parameter in parameters]
    found.append(block._parameters["skip"])
    addresses = [native.address(parameter) for parameter in found]
    if addresses != checked:
        narrow = [found[i] for i in _NARROW]
        if not all(native.readable(x, WEIGHTS) for x in narrow):
            return None
        if not all(native.readable(x) for i, x in enumerate(found) if i not in _NARROW):
            return None
        block.checked = addresses
    return found


def _laid_out(part: Tensor) -> Tensor:
    """A part of a state as the native kernels read it."""
    return part.to(torch.float32).contiguous()
