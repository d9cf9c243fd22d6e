"""One token for every sequence through an xLSTM-7B block, natively; as ``step.py``, whose mLSTM it has.

Floor per token: every weight read once, 4 bytes each (2 in bfloat16), and each sequence's C read and written.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from . import native
from .rows import WEIGHTS
from .step import State

_MATRICES = ("maps", "out", "up", "down")


class CappedWeights(NamedTuple):
    """The parameters of an xLSTM-7B block, as ``native/capped_step.h`` has them: contiguous, on the CPU, float32.

    Attributes:
        norm: of the RMSNorm before the cell, [width].
        maps: q, k, v and output gate, [2 qk + 2 width, width], may be bfloat16; maps_bias: [2 qk + 2 width].
        gates: input gates first, [2 heads, width]; gates_bias: [2 heads].
        head_norm: [heads, width / heads].
        out: [width, width], may be bfloat16; out_bias: [width].
        feed_forward_norm: of the RMSNorm before the feed-forward, [width].
        up: gate first, [2 inner, width], may be bfloat16; up_bias: [2 inner].
        down: [width, inner], may be bfloat16; down_bias: [width].
    """

    norm: Tensor
    maps: Tensor
    maps_bias: Tensor | None
    gates: Tensor
    gates_bias: Tensor
    head_norm: Tensor
    out: Tensor
    out_bias: Tensor | None
    feed_forward_norm: Tensor
    up: Tensor
    up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None

    def readable(self) -> bool:
        """Tell whether the native kernels can read them as they lie."""
        named = self._asdict()
        return all(native.readable(x, WEIGHTS if name in _MATRICES else None) for name, x in named.items())

    def table(self) -> NDArray[np.int64]:
        """Return where they lie, for as long as they are not moved."""
        return np.array([native.pointer(x) or 0 for x in self], np.int64)

    @property
    def narrow(self) -> int:
        """Which matrices are bfloat16, a bit each."""
        return sum((getattr(self, name).dtype == torch.bfloat16) << bit for bit, name in enumerate(_MATRICES))


def capped_mixer_step(
    maps: Float[Tensor, "sequences maps_width"],
    normed: Float[Tensor, "sequences width"],
    weights: CappedWeights,
    *,
    state: State,
    cap: float,
    head_eps: float,
    table: NDArray[np.int64] | None = None,
    reuse_state: bool = False,
) -> tuple[Float[Tensor, "sequences width"], State]:
    """Return what ``out`` reads, and the new state (C, n, m).

    ``maps`` are q, k, v and output gate, made of ``normed``, which the gates read too. All tensors are float32 and
    contiguous. ``cap`` 0 stands for none. With ``reuse_state`` the new state stands where the old one stood. ``table``
    is ``weights.table()``, where it is known.
    """
    mixed, after = torch.empty_like(normed), _after(state, reuse_state)
    where = weights.table() if table is None else table
    call = native.function("capped_mixer_step", "p ppp ppp ppp iiiii ff")
    pointers = [part.data_ptr() for part in (*state, *after, maps, normed, mixed)]
    call(where.ctypes.data, *pointers, *_sizes(normed, weights), torch.get_num_threads(), cap, head_eps)
    return mixed, after


def capped_block_step(
    x: Float[Tensor, "sequences width"],
    weights: CappedWeights,
    *,
    state: State,
    cap: float,
    eps: float,
    head_eps: float,
    table: NDArray[np.int64] | None = None,
    reuse_state: bool = False,
) -> tuple[Float[Tensor, "sequences width"], State]:
    """Return the output of a block for the residual stream ``x``, and the new state; as ``capped_mixer_step``.

    Meant for up to ``rows_at_once`` sequences, as ``mlstm_block_step``.
    """
    y, after = torch.empty_like(x), _after(state, reuse_state)
    where = weights.table() if table is None else table
    call = native.function("capped_block_step", "p ppp ppp pp iiiii ff ii p f")
    pointers = [part.data_ptr() for part in (*state, *after, x, y)]
    inner = weights.down.shape[1]
    sizes = (*_sizes(x, weights), torch.get_num_threads())
    call(
        where.ctypes.data,
        *pointers,
        *sizes,
        cap,
        head_eps,
        inner,
        weights.narrow,
        native.address("linear_some", "bfloat16"),
        eps,
    )
    return y, after


def _after(state: State, reuse_state: bool) -> State:
    return state if reuse_state else tuple(map(torch.empty_like, state))  # type: ignore[return-value]


def _sizes(x: Tensor, weights: CappedWeights) -> tuple[int, int, int, int]:
    """Rows, width, width of q, heads."""
    rows, width = x.shape
    return rows, width, (len(weights.maps) - 2 * width) // 2, len(weights.head_norm)
