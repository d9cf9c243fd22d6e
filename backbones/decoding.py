"""Decoding: one token of each sequence through an mLSTM block, natively.

The mathematics is that of ``MLSTMBlock.forward`` and ``CappedMLSTMBlock.forward``. Their dozens of small tensors cost
more than the reading of the weights when there is one token, and go over the matrix memory more often than needed when
there are many. What is not a plain block of float32 on a CPU, or records gradients, goes the ordinary way;
``kernels.chosen_backend("decoding")`` tells whether there is another.

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

from ..kernels import MLSTMState, activation, chosen_backend, rms_norm
from ..kernels.capped_step import CappedWeights, capped_block_step, capped_mixer_step
from ..kernels.step import BlockWeights, mlstm_block_step, mlstm_mixer_step, rows_at_once
from ..sequences import PackedBatch
from .layers import (
    BlockLinear,
    CausalConvolution,
    FeedForward,
    HeadNorm,
    Linear,
    OffsetLayerNorm,
    RMSNorm,
    apply_linear,
)
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
_CAPPED_PARTS = (
    ("norm", RMSNorm),
    ("query_key_value_output", Linear),
    ("gates", nn.Linear),
    ("head_norm", HeadNorm),
    ("out", Linear),
    ("feed_forward_norm", RMSNorm),
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
) -> tuple[Float[Tensor, "sequences width"], Any] | None:
    """Return the residual stream after a block and the block's new state; None where it must go the ordinary way.

    ``context`` is that of the batch, ``state`` the block's own.
    """
    if not hasattr(block, "decoding") or block.training or _hooked(block):
        return None
    if "query_key_value_output" in block._modules:
        return _decode_capped(block, x, state, reuse_state)
    return _decode(block, x, context, state, reuse_state)


def _decode(
    block: Any, x: Tensor, context: Any, state: ConvolvedState, reuse_state: bool
) -> tuple[Tensor, ConvolvedState] | None:
    known = _known(block)
    if known is None:
        return None
    weights, table, most, eps, head_eps, _, offsets, frequencies = known
    for stored, effective in offsets:
        np.add(stored, np.float32(1), out=effective)
    turns, whole = None if frequencies is None else _turns(context.positions, frequencies), block.rotary == "width"
    past, C, n, m = (_laid_out(part) for part in (state.convolution, *state.cell))
    if x.shape[0] <= most:
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
        x = apply_linear(mixed, weights.down, weights.down_bias, residual=x)
    past, *cell = after
    return x, ConvolvedState(MLSTMState(*cell), past)


class _Known(NamedTuple):
    """What is known of a block whose parameters lie at ``addresses``.

    Up to ``most`` sequences are decoded in one call. ``offsets`` are the weights stored minus one, and where they lie
    in ``weights`` as they are; ``frequencies`` those of rotary positions.
    """

    weights: BlockWeights
    table: NDArray[np.int64]
    most: int
    eps: float
    head_eps: float
    addresses: list[int]
    offsets: list[tuple[NDArray[np.float32], NDArray[np.float32]]]
    frequencies: NDArray[np.float64] | None


def _known(block: Any) -> _Known | None:
    """Return the parameters of a block if it is a plain one and native kernels can read them.

    What was found is kept on the block, for as long as nothing has moved.
    """
    modules = block._modules
    found: list[Any] = []
    for name, kinds in _PARTS:
        module = modules[name]
        if type(module) not in kinds or _hooked(module):
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
        most = rows_at_once(weights.up, weights.down)
        known = _Known(weights, weights.table(), most, *eps, addresses, offsets, frequencies)
        block.decoding = known
    return known


def _decode_capped(block: Any, x: Tensor, state: MLSTMState, reuse_state: bool) -> tuple[Tensor, MLSTMState] | None:
    """The same for an xLSTM-7B block."""
    known = _known_capped(block)
    if known is None:
        return None
    weights, table, most, _ = known
    C, n, m = (_laid_out(part) for part in state)
    cap, eps, head_eps = float(block.cap or 0), block.norm.eps, block.head_norm.eps
    if x.shape[0] <= most:
        x, after = capped_block_step(
            x, weights, state=(C, n, m), cap=cap, eps=eps, head_eps=head_eps, table=table, reuse_state=reuse_state
        )
        return x, MLSTMState(*after)
    normed = rms_norm(x, weights.norm, eps)
    maps = apply_linear(normed, weights.maps, weights.maps_bias)
    mixed, after = capped_mixer_step(
        maps, normed, weights, state=(C, n, m), cap=cap, head_eps=head_eps, table=table, reuse_state=reuse_state
    )
    x = apply_linear(mixed, weights.out, weights.out_bias, residual=x)
    up = apply_linear(rms_norm(x, weights.feed_forward_norm, eps), weights.up, weights.up_bias)
    x = apply_linear(activation(up, "swiglu"), weights.down, weights.down_bias, residual=x)
    return x, MLSTMState(*after)


class _KnownCapped(NamedTuple):
    """As ``_Known``, of an xLSTM-7B block."""

    weights: CappedWeights
    table: NDArray[np.int64]
    most: int
    addresses: list[int]


def _known_capped(block: Any) -> _KnownCapped | None:
    """As ``_known``, of an xLSTM-7B block; its norms' weights must be stored as they are."""
    modules = block._modules
    found: dict[str, Any] = {}
    for name, kind in _CAPPED_PARTS:
        module = modules[name]
        if type(module) is not kind or _hooked(module):
            return None
        found[name] = module
    feed_forward = modules["feed_forward"]
    inside: list[Any] = [feed_forward._modules[name] for name in ("up", "down")]
    if type(feed_forward) is not FeedForward or any(type(m) is not Linear or _hooked(m) for m in inside):
        return None
    if _hooked(feed_forward) or found["head_norm"].offset:
        return None
    norm, maps, gates, head_norm, out, feed_forward_norm = found.values()
    tensors = [norm.weight, maps.weight, maps.bias, gates.weight, gates.bias, head_norm.weight, out.weight, out.bias]
    tensors += [feed_forward_norm.weight, *(tensor for m in inside for tensor in (m.weight, m.bias))]
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    known: _KnownCapped | None = block.decoding
    if known is None or known.addresses != addresses:
        weights = CappedWeights(*tensors)
        if not weights.readable():
            return None
        most = rows_at_once(weights.maps, weights.out, weights.up, weights.down)
        known = block.decoding = _KnownCapped(weights, weights.table(), most, addresses)
    return known


def _hooked(module: nn.Module) -> bool:
    """Tell whether others see, and may change, what goes in and out."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


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
