"""One token for every sequence, natively: the mLSTM, and the whole of a NeurIPS block around it.

The formulas stand in ``mlstm.py`` and in ``backbones/xlstm.py``; here each number of the weights and of the memory is
read once. There is no backward: what needs a gradient goes the ordinary way.

Floor per token and head of the mLSTM: 6 qk_dim v_dim FLOP, and C read and written, 8 qk_dim v_dim bytes. Reached of
what memory gives to a product in place: 0.9 to 1.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from . import native
from .linear import SOME_TOKENS, SOME_TOKENS_FLOAT32
from .rows import FEW, WEIGHTS

State = tuple[Tensor, Tensor, Tensor]  # C, n, m
BlockState = tuple[Tensor, Tensor, Tensor, Tensor]  # last inputs of the convolution [sequences, past, inner], C, n, m


class BlockWeights(NamedTuple):
    """The parameters of a NeurIPS mLSTM block, as ``native/step.h`` has them: contiguous, on the CPU, float32.

    Attributes:
        norm, norm_bias: [width].
        up: [2 inner, width], may be bfloat16; up_bias: [2 inner].
        down: [width, inner], may be bfloat16; down_bias: [width].
        taps: of the convolution, [inner, taps]; taps_bias: [inner].
        query_key: block-diagonal, [2, blocks, out, in]; query_key_bias: [2, blocks, out].
        value: block-diagonal, [1, blocks, out, in]; value_bias: [1, blocks, out].
        gates: of q, k and v joined, input gates first, [2 heads, 3 inner]; gates_bias: [2 heads].
        head_norm: [heads, inner / heads].
        skip: [inner].
    """

    norm: Tensor
    norm_bias: Tensor | None
    up: Tensor
    up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None
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

    def readable(self) -> bool:
        """Tell whether the native kernels can read them as they lie."""
        wide = self._replace(up=None, down=None)  # type: ignore[arg-type]
        return all(map(native.readable, wide)) and all(native.readable(x, WEIGHTS) for x in (self.up, self.down))

    def table(self) -> NDArray[np.int64]:
        """Return where they lie, for as long as they are not moved."""
        return np.array([native.pointer(x) or 0 for x in self], np.int64)


def rows_at_once(*matrices: Tensor) -> int:
    """How many sequences a whole block with such linear maps decodes in one call: those that need nothing packed."""
    narrow = [matrix for matrix in matrices if matrix.dtype == torch.bfloat16]
    if not narrow:
        return SOME_TOKENS_FLOAT32
    if not native.has_bfloat16() or any(matrix.shape[1] % 2 for matrix in narrow):
        return FEW
    return SOME_TOKENS if len(narrow) == len(matrices) else SOME_TOKENS_FLOAT32


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
    outputs = tuple(native.empty(*tensor.shape) for tensor in (*inputs[5:], inputs[2]))
    call = native.function("mlstm_step", "pppppppp pppp iiiii")
    call(*map(native.pointer, (*inputs, *outputs)), sequences, heads, qk_dim, v_dim, torch.get_num_threads())
    C, n, m, h = outputs
    return h, (C, n, m)


def mlstm_mixer_step(
    up: Float[Tensor, "sequences up_width"],
    weights: BlockWeights,
    *,
    state: BlockState,
    head_eps: float,
    turns: Float[Tensor, "sequences turning"] | None = None,
    turn_whole: bool = False,
    table: NDArray[np.int64] | None = None,
    reuse_state: bool = False,
) -> tuple[Float[Tensor, "sequences inner"], BlockState]:
    """Return the input of a block's down-projection, and the new state.

    ``up`` [sequences, 2 inner] is the output of the up-projection: the cell's input, and the gate of its output. All
    tensors are float32 and contiguous. With ``reuse_state`` the new state stands where the old one stood. ``table`` is
    ``weights.table()``, where it is known. ``turns`` are rotary positions of q and k, the cosine and the sine of each
    pair of channels: of each head [sequences, inner / heads], or with ``turn_whole`` of all heads as one vector
    [sequences, inner], and then the gates see them turned.
    """
    mixed = up.new_empty(up.shape[0], weights.skip.shape[0])
    call = native.function("mlstm_mixer_step", "p pppp pppp pp iiiiii i pi f")
    arguments, after = _arguments(
        up, mixed, weights, state=state, turns=turns, turn_whole=turn_whole, table=table, reuse_state=reuse_state
    )
    call(*arguments, head_eps)
    return mixed, after


def mlstm_block_step(
    x: Float[Tensor, "sequences width"],
    weights: BlockWeights,
    *,
    state: BlockState,
    eps: float,
    head_eps: float,
    turns: Float[Tensor, "sequences turning"] | None = None,
    turn_whole: bool = False,
    table: NDArray[np.int64] | None = None,
    reuse_state: bool = False,
) -> tuple[Float[Tensor, "sequences width"], BlockState]:
    """Return the output of a block for the residual stream ``x``, and the new state; as ``mlstm_mixer_step``.

    Meant for up to ``rows_at_once`` sequences: the linear maps are those of ``linear_rows``, or of ``linear`` for some.
    """
    y = torch.empty_like(x)
    call = native.function("mlstm_block_step", "p pppp pppp pp iiiiii i pi f ii p f")
    arguments, after = _arguments(
        x, y, weights, state=state, turns=turns, turn_whole=turn_whole, table=table, reuse_state=reuse_state
    )
    narrow = (weights.up.dtype == torch.bfloat16, weights.down.dtype == torch.bfloat16)
    call(*arguments, head_eps, *narrow, native.address("linear_some", "bfloat16"), eps)
    return y, after


def _arguments(
    x: Tensor,
    y: Tensor,
    weights: BlockWeights,
    *,
    state: BlockState,
    turns: Tensor | None,
    turn_whole: bool,
    table: NDArray[np.int64] | None,
    reuse_state: bool,
) -> tuple[list[int | None], BlockState]:
    """What both steps are called with, and the tensors that will hold the new state."""
    after: BlockState = state if reuse_state else tuple(native.empty(*part.shape) for part in state)  # type: ignore[assignment]
    inner, taps = weights.taps.shape
    sizes = (y.shape[0], weights.norm.shape[0], inner, weights.head_norm.shape[0], taps, weights.value.shape[-1])
    where = weights.table() if table is None else table
    tensors = [part.data_ptr() for part in (*state, *after, x, y)]
    turning = (native.pointer(turns), turn_whole)
    return [where.ctypes.data, *tensors, *sizes, torch.get_num_threads(), *turning], after
