"""Variable-length attention on packed sequences, without a padded copy of the batch.

    y_i = sum_j softmax_j(scale * q_i . k_j) v_j      over the keys j that i may see, in its own sequence

Backends: ``native`` (``attention_native.py``, ``native/attention.h``) is FlashAttention-2 (Dao 2023, arXiv:2307.08691)
for packed sequences on a CPU, in float32 inside; its result does not depend on the number of threads. ``torch`` runs
sequences with equal numbers of queries and keys together through scaled_dot_product_attention, with a mask [queries,
keys] only for a window, a prefix or cached keys.

Floor per query and head: 4 dim FLOP per visible key forward and 10 dim backward, and 4 (2 dim + 2 dim / queries per
key) bytes in float32. Native on 2 Zen 4 cores (220 GFLOP/s), best seen: one sequence of 4,096, 8 heads of 64,
forward 150 and forward+backward 169 GFLOP/s; 512 sequences of 20-120 tokens 60 (memory and half-filled
blocks). One query per sequence with a long cache: 25 of 30 GB/s.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..errors import ConfigError, ShapeError
from .attention_native import Sizes, native_attention
from .backends import check_precision, choose_backend
from .packing import collect, expect_shape, sequence_lengths, spread


def attention(
    q: Float[Tensor, "tokens heads dim"],
    k: Float[Tensor, "keys kv_heads dim"],
    v: Float[Tensor, "keys kv_heads v_dim"],
    *,
    cu_seqlens: Int[Tensor, " boundaries"] | None = None,
    cu_seqlens_k: Int[Tensor, " key_boundaries"] | None = None,
    lengths_k: Int[Tensor, " sequences"] | None = None,
    causal: bool = True,
    window: int | None = None,
    prefix: Int[Tensor, " sequences"] | None = None,
    scale: float | int | None = None,
    precision: str = "float32",
    backend: str = "auto",
) -> Float[Tensor, "tokens heads v_dim"]:
    """Attend within each sequence.

    The queries of a sequence are its last tokens: with ``cu_seqlens_k`` (default: ``cu_seqlens``) a sequence may have
    more keys than queries, the older ones being its key-value cache. Heads may share keys: ``heads`` is a multiple of
    ``kv_heads``, and query heads ``g * heads / kv_heads ...`` use key head ``g``.

    With ``lengths_k`` only so many of the rows that ``cu_seqlens_k`` gives a sequence hold a key, the first ones; the
    others are room for later ones and are not read.

    ``window`` is the number of tokens seen, itself included: the last ``window`` when causal, and those less than
    ``window`` away on both sides when not. ``prefix`` [sequences] tokens at the start of each sequence see each other
    both ways, whatever the window. ``scale`` is 1 / sqrt(dim) by default.

    ``precision="bf16"`` lets the operands of both products be rounded to bfloat16; sums stay float32. The native
    backend does so where the processor multiplies such pairs, heads are even, a sequence has more than one query, and
    no gradient is recorded.

    Neither causal nor with a window, the keys may be those of another sequence (cross-attention), also fewer than the
    queries.

    Raises:
        ShapeError: the arguments disagree, or a sequence has more queries than keys, or in cross-attention none.
        ConfigError: ``window`` is not positive, or unknown ``precision`` or ``backend``.
    """
    check_precision(precision)
    (tokens, heads, dim), (keys, kv_heads, _) = q.shape, k.shape
    expect_shape("k", k, (keys, kv_heads, dim))
    expect_shape("v", v, (keys, kv_heads, v.shape[-1]))
    if not kv_heads or heads % kv_heads:
        raise ShapeError("k", tuple(k.shape), f"a number of heads that divides the {heads} of q")
    if window is not None and window < 1:
        raise ConfigError(f"An attention window holds at least the token itself; window is {window}.")
    lengths = sequence_lengths(cu_seqlens, tokens)
    key_edges = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    rooms = key_lengths = sequence_lengths(key_edges, keys, "cu_seqlens_k")
    if lengths_k is not None:
        expect_shape("lengths_k", lengths_k, (len(rooms),))
        key_lengths = lengths_k.detach().cpu().numpy().astype(np.int64)
        if (key_lengths < 0).any() or (key_lengths > rooms).any():
            raise ShapeError("lengths_k", key_lengths.tolist(), f"no more than the rows {rooms.tolist()}")
    needed = lengths if causal or window is not None else np.minimum(lengths, 1)
    if len(lengths) != len(key_lengths) or (needed > key_lengths).any():
        raise ShapeError("cu_seqlens_k", key_lengths.tolist(), f"keys for at least {lengths.tolist()} queries")
    prefixes = np.zeros(len(lengths), np.int64)
    if prefix is not None:
        expect_shape("prefix", prefix, (len(lengths),))
        prefixes = prefix.detach().cpu().numpy().astype(np.int64)
    chosen = choose_backend("attention", backend, q.device, q.dtype)
    if not tokens or not v.shape[-1]:
        return q.new_zeros(tokens, heads, v.shape[-1])
    scale = dim**-0.5 if scale is None else float(scale)
    starts = np.cumsum(rooms) - rooms
    if chosen == "native":
        sizes = Sizes(lengths, starts, key_lengths, prefixes)
        return native_attention(q, k, v, sizes, causal=causal, window=window, scale=scale, precision=precision)
    if lengths_k is not None:
        filled = np.arange(key_lengths.sum()) + np.repeat(starts - np.cumsum(key_lengths) + key_lengths, key_lengths)
        k, v = (collect(x, torch.from_numpy(filled).to(x.device)) for x in (k, v))
    return _grouped(q, k, v, (lengths, key_lengths, prefixes), causal=causal, window=window, scale=scale)


def _grouped(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sizes: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]],
    *,
    causal: bool,
    window: int | None,
    scale: float,
) -> Tensor:
    """Sequences of equal lengths together; one permutation makes every group a contiguous slice."""
    lengths, key_lengths, prefixes = sizes
    (tokens, heads, dim), (keys, kv_heads, _) = q.shape, k.shape
    order = np.lexsort((lengths, key_lengths))
    q_row, k_row = (torch.from_numpy(_rows(sizes, order)).to(q.device) for sizes in (lengths, key_lengths))
    q, k, v = spread(q, q_row, tokens), spread(k, k_row, keys), spread(v, k_row, keys)
    outputs, q_start, k_start = [], 0, 0
    for members in _groups(lengths[order], key_lengths[order], order):
        queries, seen = int(lengths[members[0]]), int(key_lengths[members[0]])
        q_end, k_end = q_start + len(members) * queries, k_start + len(members) * seen
        if queries:
            mask = _mask(queries, seen, prefixes[members], causal=causal, window=window, device=q.device)
            outputs.append(
                scaled_dot_product_attention(
                    q[q_start:q_end].view(-1, queries, heads, dim).transpose(1, 2),
                    k[k_start:k_end].view(-1, seen, kv_heads, dim).transpose(1, 2),
                    v[k_start:k_end].view(-1, seen, kv_heads, v.shape[-1]).transpose(1, 2),
                    attn_mask=mask,
                    is_causal=mask is None and causal and queries > 1,
                    scale=scale,
                    enable_gqa=heads != kv_heads,
                )
                .transpose(1, 2)
                .reshape(-1, heads, v.shape[-1])
            )
        q_start, k_start = q_end, k_end
    return collect(outputs[0] if len(outputs) == 1 else torch.cat(outputs), q_row)


def _rows(lengths: NDArray[np.int64], order: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the row of each token when the sequences stand in ``order``."""
    starts = np.cumsum(lengths) - lengths
    new_starts = np.empty_like(starts)
    new_starts[order] = np.cumsum(lengths[order]) - lengths[order]
    rows: NDArray[np.int64] = np.arange(lengths.sum()) + np.repeat(new_starts - starts, lengths)
    return rows


def _groups(
    lengths: NDArray[np.int64], key_lengths: NDArray[np.int64], order: NDArray[np.int64]
) -> list[NDArray[np.int64]]:
    """Cut the ordered sequences where the number of queries or keys changes."""
    if not len(order):
        return []
    changes = np.flatnonzero((np.diff(lengths) != 0) | (np.diff(key_lengths) != 0)) + 1
    return [np.asarray(group, np.int64) for group in np.split(order, changes)]


def _mask(
    queries: int, keys: int, prefixes: NDArray[np.int64], *, causal: bool, window: int | None, device: torch.device
) -> Bool[Tensor, "#sequences 1 queries keys"] | None:
    """Return which keys each query sees, or None where ``is_causal`` or no mask says it."""
    has_prefix = causal and bool((prefixes > 1).any())
    narrow = window is not None and window < keys
    if not has_prefix and not narrow and (not causal or queries in (1, keys)):
        return None
    i = torch.arange(keys - queries, keys, device=device)[:, None]
    j = torch.arange(keys, device=device)
    visible = (j <= i) if causal else torch.ones(queries, keys, dtype=torch.bool, device=device)
    if window is not None:
        visible = visible & ((i - j).abs() < window)
    visible = visible[None, None]
    if (prefixes > 1).any():
        ends = torch.from_numpy(prefixes).to(device)[:, None, None, None]
        visible = visible | ((i < ends) & (j < ends))
    return visible
