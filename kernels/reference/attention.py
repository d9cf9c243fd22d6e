"""Attention, one query after the other; see ``kernels/attention.py``."""

from __future__ import annotations

import torch
from torch import Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    causal: bool = True,
    window: int | None = None,
    prefix: Tensor | None = None,
    scale: float | int | None = None,
) -> Tensor:
    """Return the attended values, in float64."""
    q, k, v = q.double(), k.double(), v.double()
    edges = torch.tensor([0, len(q)]) if cu_seqlens is None else cu_seqlens
    key_edges = edges if cu_seqlens_k is None else cu_seqlens_k
    heads, share = q.shape[1], q.shape[1] // k.shape[1]
    outputs = []
    for s in range(len(edges) - 1):
        queries, keys = int(edges[s + 1] - edges[s]), int(key_edges[s + 1] - key_edges[s])
        leading = 0 if prefix is None else int(prefix[s])
        for i in range(keys - queries, keys):
            seen = [
                int(key_edges[s]) + j
                for j in range(keys)
                if (i < leading and j < leading) or ((j <= i or not causal) and (window is None or abs(i - j) < window))
            ]
            query = q[edges[s] + i - (keys - queries)]
            y = []
            for head in range(heads):
                scores = k[seen, head // share] @ query[head] * (q.shape[2] ** -0.5 if scale is None else scale)
                y.append(torch.softmax(scores, 0) @ v[seen, head // share])
            outputs.append(torch.stack(y))
    return torch.stack(outputs) if outputs else q.new_zeros(0, heads, v.shape[2])
