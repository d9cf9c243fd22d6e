"""mLSTM: the matrix-memory LSTM of xLSTM, on packed sequences, with state, in both directions.

    C_t = f_t C_{t-1} + i_t k_t v_t^T      n_t = f_t n_{t-1} + i_t k_t      q'_t = q_t / sqrt(qk_dim)
    h_t = C_t^T q'_t / max(|n_t . q'_t|, 1)
    log f_t = logsigmoid(forget_gate_t)    log i_t = input_gate_t, or logsigmoid(input_gate_t) with gate="sigmoid"

It runs stabilised: C and n are stored times exp(-m), m_t = max(log f_t + m_{t-1}, log i_t), m_0 = 0, and the floor 1
becomes exp(-m_t). There is no epsilon, so h does not depend on the choice of m, and the gradient is the exact one.

Source: Beck et al. 2024, xLSTM (arXiv:2405.04517), equations 19-27; chunkwise form: Beck et al. 2025, TFLA
(arXiv:2503.14376). Forms, all with the same state: step (one token per sequence), and chunkwise, of which the
quadratic parallel form is the case of one chunk. Backends: ``torch`` (``mlstm_chunkwise.py``), ``native``
(``mlstm_native.py``, ``native/mlstm.h``).

Floor per token and head, chunk length L, only the lower triangle inside a chunk computed:

    forward   L (qk_dim + v_dim) + 4 qk_dim v_dim FLOP,   4 (2 qk_dim + 2 v_dim + 2) bytes in float32
    backward  L (3 qk_dim + 2 v_dim) + 8 qk_dim v_dim FLOP, twice the bytes and the state of each chunk
    step      6 qk_dim v_dim FLOP and 8 qk_dim v_dim bytes (read C, write C), so it is bound by memory

Reached by ``native`` on two cores of a Zen 4 (214 GFLOP/s in float32; L = 48, 4 heads, qk 64, v 128): 0.61 of it
forward, 0.55 with the backward; ``benchmarks/results.md`` has the figures. ``triton`` is not timed yet.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..errors import ConfigError, ShapeError
from .backends import choose_backend
from .mlstm_chunkwise import chunkwise
from .mlstm_layout import chunk_groups
from .mlstm_native import native_mlstm
from .packing import expect_shape, gate_dtype, sequence_lengths
from .step import mlstm_step


class MLSTMState(NamedTuple):
    """What an mLSTM remembers; the true memory is ``C * exp(m)`` and ``n * exp(m)``.

    Attributes:
        C: matrix memory, [sequences, heads, qk_dim, v_dim].
        n: normaliser, [sequences, heads, qk_dim].
        m: stabiliser, [sequences, heads].
    """

    C: Tensor
    n: Tensor
    m: Tensor


@overload
def mlstm(
    q: Float[Tensor, "tokens heads qk_dim"],
    k: Float[Tensor, "tokens heads qk_dim"],
    v: Float[Tensor, "tokens heads v_dim"],
    input_gate: Float[Tensor, "tokens heads"],
    forget_gate: Float[Tensor, "tokens heads"],
    *,
    cu_seqlens: Int[Tensor, " boundaries"] | None = None,
    initial_state: MLSTMState | None = None,
    return_state: Literal[False] = False,
    reverse: bool = False,
    gate: Literal["exp", "sigmoid"] = "exp",
    backend: str = "auto",
) -> Float[Tensor, "tokens heads v_dim"]: ...


@overload
def mlstm(
    q: Float[Tensor, "tokens heads qk_dim"],
    k: Float[Tensor, "tokens heads qk_dim"],
    v: Float[Tensor, "tokens heads v_dim"],
    input_gate: Float[Tensor, "tokens heads"],
    forget_gate: Float[Tensor, "tokens heads"],
    *,
    cu_seqlens: Int[Tensor, " boundaries"] | None = None,
    initial_state: MLSTMState | None = None,
    return_state: Literal[True],
    reverse: bool = False,
    gate: Literal["exp", "sigmoid"] = "exp",
    backend: str = "auto",
) -> tuple[Float[Tensor, "tokens heads v_dim"], MLSTMState]: ...


def mlstm(
    q: Float[Tensor, "tokens heads qk_dim"],
    k: Float[Tensor, "tokens heads qk_dim"],
    v: Float[Tensor, "tokens heads v_dim"],
    input_gate: Float[Tensor, "tokens heads"],
    forget_gate: Float[Tensor, "tokens heads"],
    *,
    cu_seqlens: Int[Tensor, " boundaries"] | None = None,
    initial_state: MLSTMState | None = None,
    return_state: bool = False,
    reverse: bool = False,
    gate: Literal["exp", "sigmoid"] = "exp",
    backend: str = "auto",
) -> Float[Tensor, "tokens heads v_dim"] | tuple[Float[Tensor, "tokens heads v_dim"], MLSTMState]:
    """Run an mLSTM over packed sequences; with ``return_state`` also return each sequence's last state.

    Sequence ``s`` is ``cu_seqlens[s]:cu_seqlens[s + 1]`` and sees no other. The gates are pre-activations. ``q`` is
    scaled by 1 / sqrt(qk_dim) here; the state holds raw ``k``. Gates, normaliser and state are float32 (float64 for
    float64 input) whatever the dtype of ``q``, ``k`` and ``v``; ``h`` has the dtype of ``v``.

    With ``reverse`` each sequence runs from its last token to its first, and its state is the one after the first.
    A sequence without tokens hands its state on. The forget gate must be greater than minus infinity; an input gate of
    minus infinity writes nothing.

    Raises:
        ShapeError: the arguments disagree, or ``cu_seqlens`` does not end at ``tokens``.
        ConfigError: unknown ``gate`` or ``backend``.
    """
    tokens, heads, qk_dim = q.shape
    v_dim = v.shape[-1]
    expect_shape("k", k, (tokens, heads, qk_dim))
    expect_shape("v", v, (tokens, heads, v_dim))
    expect_shape("input_gate", input_gate, (tokens, heads))
    expect_shape("forget_gate", forget_gate, (tokens, heads))
    lengths = sequence_lengths(cu_seqlens, tokens)
    if initial_state is not None:
        expect_shape("initial_state.C", initial_state.C, (len(lengths), heads, qk_dim, v_dim))
        expect_shape("initial_state.n", initial_state.n, (len(lengths), heads, qk_dim))
        expect_shape("initial_state.m", initial_state.m, (len(lengths), heads))
    if not heads or not qk_dim or not v_dim:
        raise ShapeError("q, v", (tuple(q.shape), tuple(v.shape)), "at least one head and one dimension")
    if gate not in ("exp", "sigmoid"):
        raise ConfigError(f"The mLSTM's gate is 'exp' or 'sigmoid', not {gate!r}.")
    chosen = choose_backend("mlstm", backend, q.device, q.dtype)

    dtype = gate_dtype(q.dtype)
    with torch.autocast(q.device.type, enabled=False):
        log_input = input_gate.to(dtype) if gate == "exp" else logsigmoid(input_gate.to(dtype))
        log_forget = logsigmoid(forget_gate.to(dtype))
        state = None if initial_state is None else MLSTMState(*(part.to(dtype) for part in initial_state))
        if chosen == "triton" and tokens:
            from . import triton

            h, parts = triton.mlstm(
                q, k, v, log_input, log_forget, lengths=lengths, state=state, return_state=return_state, reverse=reverse
            )
            return h if parts is None else (h, MLSTMState(*parts))
        inputs = (q.to(dtype), k.to(dtype), v.to(dtype), log_input, log_forget)
        last: MLSTMState | None
        if tokens == 0:
            h, last = inputs[2].clone(), state or _empty_state(q, len(lengths), v_dim, dtype)
        elif np.all(lengths == 1) and (state is not None or chosen != "native"):
            before = state or _empty_state(q, tokens, v_dim, dtype)
            recorded = torch.is_grad_enabled() and any(x.requires_grad for x in (*inputs, *before))
            step = mlstm_step if chosen == "native" and not recorded else _step
            h, parts = step(*inputs, state=before)
            last = MLSTMState(*parts)
        elif chosen == "native":
            h, parts = native_mlstm(*inputs, lengths=lengths, state=state, return_state=return_state, reverse=reverse)
            last = None if parts is None else MLSTMState(*parts)
        else:
            groups = chunk_groups(lengths, heads, qk_dim, v_dim, reverse=reverse, device=q.device)
            h, parts = chunkwise(*inputs, groups=groups, state=state, sequences=len(lengths), return_state=return_state)
            last = None if parts is None else MLSTMState(*parts)
    h = h.to(v.dtype)
    if not return_state:
        return h
    assert last is not None
    return h, last


def _empty_state(q: Tensor, sequences: int, v_dim: int, dtype: torch.dtype) -> MLSTMState:
    _, heads, qk_dim = q.shape
    shapes = (sequences, heads, qk_dim, v_dim), (sequences, heads, qk_dim), (sequences, heads)
    return MLSTMState(*(q.new_zeros(shape, dtype=dtype) for shape in shapes))


def _step(
    q: Tensor, k: Tensor, v: Tensor, log_input: Tensor, log_forget: Tensor, *, state: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """One token for every sequence: the recurrence as it stands."""
    C, n, m_before = state
    kept = log_forget + m_before
    m = torch.maximum(kept, log_input)
    decay = torch.exp(kept - m)[..., None]
    written = torch.exp(log_input - m)[..., None] * k
    C = torch.addcmul(C * decay[..., None], written[..., None], v[..., None, :])
    n = torch.addcmul(written, n, decay)
    q = q * q.shape[-1] ** -0.5
    numerator = torch.matmul(q[..., None, :], C)[..., 0, :]
    normaliser = torch.maximum((q * n).sum(-1).abs(), torch.exp(-m))
    return numerator / normaliser[..., None], (C, n, m)
