"""Records to packed batches and back into the order they came in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from ..errors import ConfigError, InputError
from ..kernels import keep_freed_memory
from ..models import LanguageModel
from ..sequences import Blanked, PackedBatch, pack


@contextmanager
def evaluating(model: LanguageModel) -> Iterator[None]:
    """Run without gradients and without dropout; the model's mode is put back."""
    keep_freed_memory()
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)


def encode_all(model: LanguageModel, records: Sequence[Any]) -> list[NDArray[np.integer] | None]:
    """Token ids of every record; None stays None.

    Raises:
        InputError: a record cannot be encoded; its number is in the error.
    """
    if isinstance(records, str):
        raise InputError("A list of records is needed, and this is one string.", hint="Write [record].")
    encoded: list[NDArray[np.integer] | None] = []
    for number, record in enumerate(records, 1):
        try:
            encoded.append(None if record is None else model.tokenizer.encode(record))
        except InputError as error:
            raise error.at(record=number) if error.record is None else error from None
    return encoded


def packed(
    model: LanguageModel,
    sequences: Sequence[NDArray[np.integer] | None],
    *,
    batch_tokens: int,
    progress: bool,
    label: str,
) -> Iterator[tuple[list[int], list[PackedBatch]]]:
    """Yield groups of sequences, by number, and the batches to read one after the other with the state carried on.

    Sequences of up to ``batch_tokens`` tokens share one batch. A longer one is alone: a causal model reads it in pieces
    of ``batch_tokens``, any other whole. Empty ones are left out. The batches are on the model's device.
    """
    present = [i for i, sequence in enumerate(sequences) if sequence is not None and len(sequence)]
    arrays = [sequence for sequence in sequences if sequence is not None and len(sequence)]
    with tqdm(total=len(present), disable=not progress, desc=label, unit=" sequences") as bar:
        for group in pack([len(array) for array in arrays], batch_tokens):
            first = arrays[group[0]]
            if model.causal and len(first) > batch_tokens:
                batches = [_piece(first, start, batch_tokens) for start in range(0, len(first), batch_tokens)]
            else:
                batches = [model.whole(PackedBatch.from_sequences([arrays[i] for i in group]))]
            yield [present[i] for i in group], [batch.to(model.device) for batch in batches]
            bar.update(len(group))


def _piece(sequence: NDArray[np.integer], start: int, size: int) -> PackedBatch:
    tokens = torch.from_numpy(sequence[start : start + size].astype(np.int64))
    return PackedBatch.from_lengths(tokens, torch.tensor([len(tokens)]), offsets=torch.tensor([start]))


def laid_out(model: LanguageModel, sequences: Sequence[Blanked]) -> PackedBatch:
    """Return sequences with blanks as one batch on the model's device."""
    batch = PackedBatch.from_sequences([one.tokens for one in sequences])
    positions, blocks = (torch.from_numpy(np.concatenate([one[part] for one in sequences])) for part in (1, 2))
    conditions = {"prefix": torch.tensor([one.prefix for one in sequences])} if model.backbone.config.prefixed else {}
    return PackedBatch(batch.tokens, batch.cu_seqlens, positions, conditions, block_positions=blocks).to(model.device)


def conditioned(model: LanguageModel, batch: PackedBatch, conditions: Mapping[str, int] | None) -> PackedBatch:
    """Return the batch with these conditions for all of its sequences.

    Raises:
        ConfigError: the head of the model knows no such condition.
    """
    if not conditions:
        return batch
    known = dict(model.head.config.conditions)
    unknown = [name for name in conditions if name not in known]
    if unknown:
        raise ConfigError(f"The model has no condition {unknown[0]!r}; it has {', '.join(known) or 'none'}.")
    of_all = {name: torch.full((len(batch),), value, device=batch.tokens.device) for name, value in conditions.items()}
    return replace(batch, conditions={**batch.conditions, **of_all})


def ordinary(model: LanguageModel, tokens: torch.Tensor) -> torch.Tensor:
    """Tell for each token whether it stands for a part of the input, as no special token does."""
    special = torch.tensor(sorted(model.vocabulary.special_ids), dtype=torch.int64, device=tokens.device)
    return ~torch.isin(tokens, special)
