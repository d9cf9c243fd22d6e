"""Decoding: one token of each sequence through a NeurIPS mLSTM block, natively.

The mathematics is that of ``MLSTMBlock.forward``. Its dozens of small tensors cost more than the reading of the weights
when there is one token, and go over the matrix memory more often than needed when there are many. What is not a plain
block of float32 on a CPU, or records gradients, goes the ordinary way; ``kernels.chosen_backend("decoding")`` tells
whether there is another.

Floor per token: every weight read once, 4 bytes each (2 in bfloat16), and each sequence's C read and written.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn

from ..kernels import MLSTMState, chosen_backend
from ..kernels.rows import FEW
from ..kernels.step import BlockWeights, mlstm_block_step, mlstm_mixer_step
from ..sequences import PackedBatch
from .layers import BlockLinear, CausalConvolution, HeadNorm, Linear, OffsetLayerNorm, apply_linear
from .state import ConvolvedState

_PARTS = (  # of a plain block; an adapter, a parametrisation or a hook makes it another
    ("norm", (nn.LayerNorm, OffsetLayerNorm)),
    ("up", (Linear,)),
    ("down", (Linear,)),
    ("convolution", (CausalConvolution,)),
    ("query_key", (BlockLinear,)),
    ("value", (BlockLinear,)),
    ("gates", (nn.Linear,)),
    ("head_norm", (HeadNorm,)),
)


def decodes(x: Float[Tensor, "tokens width"], batch: PackedBatch) -> bool:
    """Tell whether a batch with a state is one token of each sequence, and native kernels may run."""
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return False
    if not x.is_cpu or x.dtype != torch.float32 or not 0 < x.shape[0] == len(batch):
        return False
    return chosen_backend("decoding", x.device, x.dtype) == "native" and bool((np.diff(batch.cu_seqlens) == 1).all())


def decode(
    block: nn.Module, x: Float[Tensor, "sequences width"], context: Any, state: Any, *, reuse_state: bool
) -> tuple[Float[Tensor, "sequences width"], ConvolvedState] | None:
    """Return the residual stream after a block and the block's new state; None where it must go the ordinary way.

    ``context`` is that of the batch, ``state`` the block's own.
    """
    known = _known(block)
    if known is None:
        return None
    weights, table, eps, head_eps, _, offsets, frequencies = known
    for stored, effective in offsets:
        np.add(stored, np.float32(1), out=effective)
    turns, whole = None if frequencies is None else _turns(context.positions, frequencies), block.rotary == "width"
    past, C, n, m = (_laid_out(part) for part in (state.convolution, *state.cell))
    if x.shape[0] <= FEW:
        x, after = mlstm_block_step(
            x,
            weights,
            state=(past, C, n, m),
            eps=eps,
            head_eps=head_eps,
            turns=turns,
            turn_whole=whole,
            table=table,
            reuse_state=reuse_state,
        )
    else:
        normed = F.layer_norm(x, x.shape[1:], weights.norm, weights.norm_bias, eps)
        up = apply_linear(normed, weights.up, weights.up_bias)
        mixed, after = mlstm_mixer_step(
            up,
            weights,
            state=(past, C, n, m),
            head_eps=head_eps,
            turns=turns,
            turn_whole=whole,
            table=table,
            reuse_state=reuse_state,
        )
        x = x + apply_linear(mixed, weights.down, weights.down_bias)
    past, *cell = after
    return x, ConvolvedState(MLSTMState(*cell), past)


class _Known(NamedTuple):
    """What is known of a block whose parameters lie at ``addresses``.

    ``offsets`` are the weights stored minus one, and where they lie in ``weights`` as they are; ``frequencies`` those
    of rotary positions.
    """

    weights: BlockWeights
    table: NDArray[np.int64]
    eps: float
    head_eps: float
    addresses: list[int]
    offsets: list[tuple[NDArray[np.float32], NDArray[np.float32]]]
    frequencies: NDArray[np.float64] | None


def _known(block: Any) -> _Known | None:
    """Return the parameters of a block if it is a plain one and native kernels can read them.

    What was found is kept on the block, for as long as nothing has moved.
    """
    if not hasattr(block, "decoding") or block.training or block._forward_hooks or block._forward_pre_hooks:
        return None
    modules = block._modules
    found: list[Any] = []
    for name, kinds in _PARTS:
        module = modules[name]
        if type(module) not in kinds or module._forward_hooks or module._forward_pre_hooks:
            return None
        found += (module._parameters["weight"], module._parameters.get("bias"))
    found[-1] = block._parameters["skip"]  # in place of the head norm's bias: it has none
    addresses = [0 if parameter is None else parameter.data_ptr() for parameter in found]
    known: _Known | None = block.decoding
    if known is None or known.addresses != addresses:
        weights = BlockWeights(*found)
        if not weights.readable():
            return None
        offsets = []
        if block.head_norm.offset:
            norm, head_norm = torch.empty_like(weights.norm), torch.empty_like(weights.head_norm)
            pairs = ((weights.norm, norm), (weights.head_norm, head_norm))
            offsets = [(stored.detach().numpy(), effective.detach().numpy()) for stored, effective in pairs]
            weights = weights._replace(norm=norm, head_norm=head_norm)
        eps, frequencies = (block.norm.eps, block.head_norm.eps), _frequencies(block)
        known = _Known(weights, weights.table(), *eps, addresses, offsets, frequencies)
        block.decoding = known
    return known


def _frequencies(block: Any) -> NDArray[np.float64] | None:
    """Angle per position of each pair of channels that turn, or None; see ``kernels.rotary``."""
    if block.rotary is None:
        return None
    inner = len(block.skip)
    dim = inner if block.rotary == "width" else inner // block.heads
    frequencies: NDArray[np.float64] = float(block.rotary_base) ** (-np.arange(0, dim, 2) / dim)
    return frequencies


def _turns(
    positions: Int[Tensor, " sequences"], frequencies: NDArray[np.float64]
) -> Float[Tensor, "sequences turning"]:
    """Cosine and sine of each pair side by side."""
    angles = positions.numpy()[:, None] * frequencies
    turns = np.empty((*angles.shape, 2), np.float32)
    np.cos(angles, out=turns[:, :, 0], casting="same_kind")
    np.sin(angles, out=turns[:, :, 1], casting="same_kind")
    return torch.from_numpy(turns).flatten(1)


def _laid_out(part: Tensor) -> Tensor:
    """A part of a state as the native kernels read it."""
    return part if part.dtype == torch.float32 and part.is_contiguous() else part.to(torch.float32).contiguous()
