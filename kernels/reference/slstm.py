"""sLSTM, one step after the other (Beck et al. 2024, arXiv:2405.04517, equations 8-18); see ``kernels/slstm.py``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .sequences import running_tokens

State = tuple[Tensor, Tensor, Tensor, Tensor]


def slstm(
    gates: Tensor,
    recurrent: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    initial_state: State | None = None,
    reverse: bool = False,
) -> tuple[Tensor, State]:
    """Return y and the state (y, c, n, m) of each sequence, in float64."""
    gates, recurrent = gates.double(), recurrent.double()
    tokens, _, heads, head_dim = gates.shape
    outputs: list[Tensor] = [gates.new_zeros(heads, head_dim)] * tokens
    states = []
    for sequence, steps in enumerate(running_tokens(cu_seqlens, tokens, reverse)):
        if initial_state is None:
            y, c, n, m = (gates.new_zeros(heads, head_dim) for _ in range(4))
        else:
            y, c, n, m = (part[sequence].double() for part in initial_state)
        for t in steps:
            raw = gates[t] + torch.einsum("ghoi,hi->gho", recurrent, y)
            kept = logsigmoid(raw[1]) + m
            m = torch.where(n == 0, raw[0], torch.maximum(raw[0], kept))
            i, f = torch.exp(raw[0] - m), torch.exp((kept - m).clamp(max=0))
            c = f * c + i * torch.tanh(raw[2])
            n = f * n + i
            y = torch.sigmoid(raw[3]) * c / n
            outputs[t] = y
        states.append((y, c, n, m))
    y_all = torch.stack(outputs) if tokens else gates[:, 0]
    if not states:
        return y_all, (y_all, y_all, y_all, y_all)
    y, c, n, m = (torch.stack(parts) for parts in zip(*states, strict=True))
    return y_all, (y, c, n, m)
