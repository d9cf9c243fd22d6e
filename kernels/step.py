"""One token for every sequence, natively: the mLSTM, and what stands around it in a NeurIPS block.

The formulas stand in ``mlstm.py`` and ``backbones/xlstm.py``; here they run in one pass over the memory. There is no
backward: what needs a gradient goes the ordinary way.

Floor per token and head: 6 qk_dim v_dim FLOP, and C read and written, 8 qk_dim v_dim bytes. Reached of what memory gives
to a product in place: 0.95.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from . import native

State = tuple[Tensor, Tensor, Tensor]


class MixerWeights(NamedTuple):
    """Of a NeurIPS mLSTM block between up- and down-projection; all float32 and contiguous.

    Attributes:
        taps: of the convolution, [inner, taps]; taps_bias: [inner].
        query_key: block-diagonal, [2, blocks, out, in]; query_key_bias: [2, blocks, out] or None.
        value: block-diagonal, [1, blocks, out, in]; value_bias: [1, blocks, out] or None.
        gates: of q, k and v joined, input gates first, [2 heads, 3 inner]; gates_bias: [2 heads].
        head_norm: [heads, inner / heads].
        skip: [inner].
    """

    taps: Tensor
    taps_bias: Tensor
    query_key: Tensor
    query_key_bias: Tensor | None
    value: Tensor
    value_bias: Tensor | None
    gates: Tensor
    gates_bias: Tensor
    head_norm: Tensor
    skip: Tensor


def mlstm_step(
    q: Float[Tensor, "sequences heads qk_dim"],
    k: Float[Tensor, "sequences heads qk_dim"],
    v: Float[Tensor, "sequences heads v_dim"],
    log_input: Float[Tensor, "sequences heads"],
    log_forget: Float[Tensor, "sequences heads"],
    *,
    state: State,
) -> tuple[Float[Tensor, "sequences heads v_dim"], State]:
    """Return ``h`` and the new (C, n, m); all tensors are float32."""
    (sequences, heads, qk_dim), v_dim = q.shape, v.shape[-1]
    inputs = tuple(tensor.contiguous() for tensor in (q, k, v, log_input, log_forget, *state))
    outputs = tuple(torch.empty_like(tensor) for tensor in (*inputs[5:], inputs[2]))
    call = native.function("mlstm_step", "pppppppp pppp iiiii")
    call(*map(native.address, (*inputs, *outputs)), sequences, heads, qk_dim, v_dim, torch.get_num_threads())
    C, n, m, h = outputs
    return h, (C, n, m)


def mlstm_mixer_step(
    up: Float[Tensor, "sequences up_width"],
    weights: MixerWeights,
    *,
    past: Float[Tensor, "sequences past inner"],
    state: State,
    eps: float,
    reuse_state: bool = False,
) -> tuple[Float[Tensor, "sequences inner"], Float[Tensor, "sequences past inner"], State]:
    """Return the input of the down-projection, the last inputs of the convolution, and (C, n, m).

    ``up`` [sequences, 2 inner] is the output of the up-projection, the cell's input and then the gate of its output.
    All tensors are float32 and contiguous. With ``reuse_state`` the new state stands where the old one stood.
    """
    inner, taps = weights.taps.shape
    heads, size = len(weights.head_norm), weights.value.shape[-1]
    before = (past, *state)
    after = before if reuse_state else tuple(map(torch.empty_like, before))
    mixed = up.new_empty(len(up), inner)
    call = native.function("mlstm_mixer_step", "ppppp ppppp p pppp pppp p iiiiii f")
    tensors = (up, *weights, *before, *after, mixed)
    call(*map(native.address, tensors), len(up), inner, heads, taps, size, torch.get_num_threads(), eps)
    past, C, n, m = after
    return mixed, past, (C, n, m)
