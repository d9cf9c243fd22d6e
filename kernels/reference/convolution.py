"""Causal depthwise convolution, one token after the other; see ``kernels/convolution.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from .sequences import running_tokens


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    reverse: bool = False,
    activation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return y and the last ``taps - 1`` inputs of each sequence, in float64."""
    x, weight = x.double(), weight.double()
    (tokens, channels), taps = x.shape, weight.shape[1]
    outputs: list[Tensor] = [x.new_zeros(channels)] * tokens
    states = []
    for sequence, steps in enumerate(running_tokens(cu_seqlens, tokens, reverse)):
        window = x.new_zeros(taps - 1, channels) if initial_state is None else initial_state[sequence].double()
        for t in steps:
            window = torch.cat((window, x[t : t + 1]))
            outputs[t] = (window * weight.T).sum(0) + (0 if bias is None else bias.double())
            window = window[1:]
        states.append(window)
    y = torch.stack(outputs) if tokens else x
    if activation == "silu":
        y = y * torch.sigmoid(y)
    return y, torch.stack(states) if states else x.new_zeros(0, taps - 1, channels)
