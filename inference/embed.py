"""Embeddings: hidden states, pooled over a sequence or one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import numpy as np
import torch
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
        batch_tokens: most tokens of one packed batch; a longer record gets a batch of its own.
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
        for group, batch in packed(model, sequences, batch_tokens=batch_tokens, progress=progress, label="embedding"):
            for found, hidden in zip(rows, _hidden(model, batch, layers), strict=True):
                for index, value in zip(group, _pool(model, batch, hidden, pooling), strict=True):
                    found[index] = value.cpu().numpy()
    results = [found if pooling == "tokens" else np.stack(found) if found else _none(model) for found in rows]
    return results[0] if isinstance(layer, int) else results


def _none(model: LanguageModel) -> NDArray[np.float32]:
    return np.zeros((0, model.width), np.float32)


def _layer(model: LanguageModel, number: int) -> int:
    depth = model.backbone.config.depth
    if not -depth - 1 <= number <= depth:
        raise ConfigError(f"There is no layer {number}: the model has layers 0 to {depth}, or -1 for the last.")
    return number % (depth + 1)


def _hidden(model: LanguageModel, batch: PackedBatch, layers: list[int]) -> list[Tensor]:
    if all(number == model.backbone.config.depth for number in layers):
        return [model.backbone(batch)[0]] * len(layers)
    every = model.backbone.hidden_layers(batch)
    return [every[number] for number in layers]


def _pool(model: LanguageModel, batch: PackedBatch, hidden: Tensor, pooling: str) -> list[Tensor]:
    """One tensor per sequence: [width], or [tokens, width] for "tokens"."""
    kept = ordinary(model, batch.tokens)
    hidden = hidden.float()
    if pooling == "mean":
        owner = batch.sequence_ids[kept]
        sums = hidden.new_zeros(len(batch), hidden.shape[1]).index_add_(0, owner, hidden[kept])
        counts = torch.bincount(owner, minlength=len(batch))
        return list(sums / counts[:, None])  # 0 / 0 is the NaN row of a record without an ordinary token
    rows = [part[here] for part, here in zip(batch.split(hidden), batch.split(kept), strict=True)]
    if pooling == "tokens":
        return rows
    return [part[-1] if len(part) else part.new_full(part.shape[1:], torch.nan) for part in rows]
