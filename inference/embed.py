"""Embeddings: hidden states, pooled over a sequence or one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from ..errors import ConfigError
from ..models import LanguageModel
from ..sequences import PackedBatch
from .batches import encode_all, evaluating, ordinary, packed

Pooling = Literal["mean", "last", "tokens"]


@overload
def embed(
    model: LanguageModel,
    records: Sequence[Any],
    *,
    layer: int = -1,
    pooling: Literal["mean", "last"] = "mean",
    batch_tokens: int = 8192,
    progress: bool = False,
) -> NDArray[np.float32]: ...
@overload
def embed(
    model: LanguageModel,
    records: Sequence[Any],
    *,
    layer: int = -1,
    pooling: Pooling,
    batch_tokens: int = 8192,
    progress: bool = False,
) -> NDArray[np.float32] | list[NDArray[np.float32]]: ...
@overload
def embed(
    model: LanguageModel,
    records: Sequence[Any],
    *,
    layer: Sequence[int],
    pooling: Pooling = "mean",
    batch_tokens: int = 8192,
    progress: bool = False,
) -> list[NDArray[np.float32]] | list[list[NDArray[np.float32]]]: ...
def embed(
    model: LanguageModel,
    records: Sequence[Any],
    *,
    layer: int | Sequence[int] = -1,
    pooling: str = "mean",
    batch_tokens: int = 8192,
    progress: bool = False,
) -> Any:
    """Embed records, in their order; packing changes nothing but rounding.

    Special tokens (begin, end, mask, ...) are never part of a result: "mean" averages over the others, "last" is the
    state at the last of them, "tokens" keeps one row for each of them.

    Args:
        model: the model.
        records: what its tokenizer encodes; None stands for a record that cannot be used.
        layer: 0 is the token embeddings, ``i`` the output of block ``i``, -1 the last one, after the final norm; or
            several of them.
        pooling: "mean", "last" or "tokens".
        batch_tokens: most tokens of one packed batch. A causal model reads a longer record in pieces of so many tokens,
            its state carried from piece to piece, so that an xLSTM takes the same memory for any length. Any other
            model needs the whole record at once: activations of some ten times its tokens times the width.
        progress: show a progress bar.

    Returns:
        float32 [records, width], with a NaN row for None and for a record without an ordinary token; with "tokens" a
        list of [tokens, width], without rows for None. A list of these, one per layer, when ``layer`` is a sequence.

    Raises:
        ConfigError: there is no such layer or pooling.
        InputError: a record cannot be encoded.
    """
    if pooling not in ("mean", "last", "tokens"):
        raise ConfigError(f"pooling is 'mean', 'last' or 'tokens', not {pooling!r}.")
    layers = [_layer(model, number) for number in ([layer] if isinstance(layer, int) else layer)]
    sequences = encode_all(model, records)
    empty = (0, model.width) if pooling == "tokens" else (model.width,)
    rows = [[np.full(empty, np.nan, np.float32) for _ in sequences] for _ in layers]
    with evaluating(model):
        for group, batches in packed(model, sequences, batch_tokens=batch_tokens, progress=progress, label="embedding"):
            for found, values in zip(rows, _pooled(model, batches, layers, pooling), strict=True):
                for index, value in zip(group, values, strict=True):
                    found[index] = value
    results = [found if pooling == "tokens" else np.stack(found) if found else _none(model) for found in rows]
    return results[0] if isinstance(layer, int) else results


def _none(model: LanguageModel) -> NDArray[np.float32]:
    return np.zeros((0, model.width), np.float32)


def _layer(model: LanguageModel, number: int) -> int:
    depth = model.backbone.config.depth
    if not -depth - 1 <= number <= depth:
        raise ConfigError(f"There is no layer {number}: the model has layers 0 to {depth}, or -1 for the last.")
    return number % (depth + 1)


def _pooled(
    model: LanguageModel, batches: Sequence[PackedBatch], layers: Sequence[int], pooling: str
) -> list[list[NDArray[np.float32]]]:
    """One array per layer and sequence, [width], or [tokens, width] for "tokens"; the batches follow on each other."""
    counts = [_counts(model, batch) for batch in batches]
    totals = np.sum(counts, axis=0)
    if pooling == "tokens":  # room for all of them at once: rows joined later would be there twice
        results = [[np.empty((total, model.width), np.float32) for total in totals] for _ in layers]
    else:
        results = [[np.full(model.width, np.nan, np.float32) for _ in totals] for _ in layers]
    sums = np.zeros((len(layers), len(totals), model.width))
    seen, state = np.zeros_like(totals), None
    for batch, count in zip(batches, counts, strict=True):
        hidden, state = model.backbone.selected_layers(
            batch, layers, state, return_state=batch is not batches[-1], reuse_state=state is not None
        )
        kept = ordinary(model, batch.tokens)
        for layer, x in enumerate(hidden):
            if pooling == "mean":
                sums[layer] += _sums(batch, kept, x)
                continue
            for sequence, (part, here) in enumerate(zip(batch.split(x), batch.split(kept), strict=True)):
                rows, at = part[here].float().cpu().numpy(), seen[sequence]
                if pooling == "tokens":
                    results[layer][sequence][at : at + len(rows)] = rows
                elif len(rows):
                    results[layer][sequence][:] = rows[-1]
        seen += count
    if pooling == "mean":
        with np.errstate(invalid="ignore"):  # 0 / 0 is the NaN row of a record without an ordinary token
            return [list((layer / totals[:, None]).astype(np.float32)) for layer in sums]
    return results


def _counts(model: LanguageModel, batch: PackedBatch) -> NDArray[np.int64]:
    """Ordinary tokens of each sequence."""
    owner = batch.sequence_ids[ordinary(model, batch.tokens)]
    counts: NDArray[np.int64] = torch.bincount(owner, minlength=len(batch)).cpu().numpy()
    return counts


def _sums(
    batch: PackedBatch, kept: Bool[Tensor, " tokens"], hidden: Float[Tensor, "tokens width"]
) -> Float[np.ndarray, "sequences width"]:
    """Sum over the ordinary tokens of each sequence."""
    rows = hidden[kept].float()
    if len(batch) == 1:  # blocked, so that a long sequence keeps its digits
        return rows.sum(0, keepdim=True).cpu().numpy()
    sums = rows.new_zeros(len(batch), rows.shape[1]).index_add_(0, batch.sequence_ids[kept], rows)
    return sums.cpu().numpy()
