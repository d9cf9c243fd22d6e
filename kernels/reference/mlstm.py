"""mLSTM, one step after the other (Beck et al. 2024, arXiv:2405.04517, equations 19-27); see ``kernels/mlstm.py``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .sequences import running_tokens

State = tuple[Tensor, Tensor, Tensor]


def mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    input_gate: Tensor,
    forget_gate: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    initial_state: State | None = None,
    reverse: bool = False,
    gate: str = "exp",
) -> tuple[Tensor, State]:
    """Return ``h`` and the state (C, n, m) of each sequence, in float64."""
    q, k, v, input_gate, forget_gate = (x.double() for x in (q, k, v, input_gate, forget_gate))
    (tokens, heads, qk_dim), v_dim = q.shape, v.shape[-1]
    log_input = input_gate if gate == "exp" else logsigmoid(input_gate)
    outputs: list[Tensor] = [v.new_zeros(heads, v_dim)] * tokens
    states: list[State] = []
    for sequence, steps in enumerate(running_tokens(cu_seqlens, tokens, reverse)):
        if initial_state is None:
            C, n, m = q.new_zeros(heads, qk_dim, v_dim), q.new_zeros(heads, qk_dim), q.new_zeros(heads)
        else:
            C, n, m = (part[sequence].double() for part in initial_state)
        for t in steps:
            log_forget = logsigmoid(forget_gate[t])
            m_new = torch.maximum(log_forget + m, log_input[t])
            a, b = torch.exp(log_forget + m - m_new), torch.exp(log_input[t] - m_new)
            C = a[:, None, None] * C + b[:, None, None] * k[t][:, :, None] * v[t][:, None, :]
            n = a[:, None] * n + b[:, None] * k[t]
            m = m_new
            query = q[t] / qk_dim**0.5
            normaliser = torch.maximum((n * query).sum(-1).abs(), torch.exp(-m))
            outputs[t] = (query[:, :, None] * C).sum(1) / normaliser[:, None]
        states.append((C, n, m))
    h = torch.stack(outputs) if tokens else v
    empty = q.new_zeros(0, heads, qk_dim, v_dim), q.new_zeros(0, heads, qk_dim), q.new_zeros(0, heads)
    if not states:
        return h, empty
    return h, (
        torch.stack([C for C, _, _ in states]),
        torch.stack([n for _, n, _ in states]),
        torch.stack([m for _, _, m in states]),
    )
