"""How likely a model finds a sequence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from ..errors import ConfigError, InputError
from ..models import LanguageModel
from ..sequences import PackedBatch, blanked, own_part, pack
from ..sequences.blanks import LONG
from .batches import conditioned, encode_all, evaluating, laid_out, ordinary, packed
from .starts import require_writing


def score(
    model: LanguageModel,
    records: Sequence[Any],
    *,
    conditions: Mapping[str, int] | None = None,
    batch_tokens: int = 8192,
    progress: bool = False,
) -> NDArray[np.float64]:
    """Return the log-likelihood (causal model) or pseudo-log-likelihood (masked model) of each record, in nats.

    A model that reads a prefix is scored as a masked one; ``log_likelihood`` has what it gives a sequence it writes.

    ``conditions`` are ids of conditions that the head of the model knows, such as ``{"species": 3}``, for all records.

    Returns:
        float64 [records], NaN where a record is None.
    """
    measure = log_likelihood if model.causal else pseudo_log_likelihood
    return measure(model, records, conditions=conditions, batch_tokens=batch_tokens, progress=progress)


def log_likelihood(
    model: LanguageModel,
    records: Sequence[Any],
    *,
    conditions: Mapping[str, int] | None = None,
    batch_tokens: int = 8192,
    progress: bool = False,
) -> NDArray[np.float64]:
    """Return the sum over each record's tokens of log p(token | tokens before it), in nats.

    The end token is included; the first token of the encoding (the begin token, where there is one) has nothing before
    it and is not. A record of more than ``batch_tokens`` tokens is read in pieces, the state carried from one to the
    next.

    A model that reads a prefix (GLM, xTrimoPGLM) writes all of a record into one blank, ``<gmask>``, as ``generate``
    does: its tokens and the ``<eop>`` behind them count. It reads a record whole.

    Returns:
        float64 [records], NaN where a record is None or has no token.

    Raises:
        ConfigError: the model is masked, or reads a prefix and lacks the tokens for blanks.
        InputError: a record cannot be encoded.
    """
    if not model.generates:
        raise ConfigError("A likelihood needs a causal model; this one is masked: use pseudo_log_likelihood.")
    sequences = encode_all(model, records)
    result = np.full(len(sequences), np.nan)
    if not model.causal:
        return _written(model, sequences, result, conditions, batch_tokens=batch_tokens, progress=progress)
    with evaluating(model):
        for group, batches in packed(model, sequences, batch_tokens=batch_tokens, progress=progress, label="scoring"):
            result[group] = 0
            before, state = None, None  # the hidden state of the last token read, and the state after it
            for piece in batches:
                batch = conditioned(model, piece, conditions)
                more = piece is not batches[-1]
                hidden, state = model.backbone(batch, state, return_state=more, reuse_state=state is not None)
                predicting = torch.cat((hidden[:1] if before is None else before, hidden[:-1]))
                at = batch.positions.nonzero()[:, 0]  # a first token has nothing before it
                chosen = _log_probabilities(model, predicting, batch, at).gather(1, batch.tokens[at, None])[:, 0]
                sums = chosen.new_zeros(len(batch)).index_add_(0, batch.sequence_ids[at], chosen)
                result[group] += sums.cpu().numpy()
                before = hidden[-1:]
    return result


def _written(
    model: LanguageModel,
    sequences: Sequence[NDArray[np.integer] | None],
    result: NDArray[np.float64],
    conditions: Mapping[str, int] | None,
    *,
    batch_tokens: int,
    progress: bool,
) -> NDArray[np.float64]:
    """Fill in the log-likelihoods of sequences that are written into one blank."""
    require_writing(model)
    present = [i for i, sequence in enumerate(sequences) if sequence is not None and len(sequence)]
    given = [np.asarray(sequences[i], np.int64) for i in present]
    made = [blanked(ids, [own_part(ids, model.vocabulary)], LONG, model.vocabulary) for ids in given]
    with evaluating(model), tqdm(total=len(made), disable=not progress, desc="scoring", unit=" sequences") as bar:
        for group in pack([len(one.tokens) for one in made], batch_tokens):
            batch = conditioned(model, laid_out(model, [made[i] for i in group]), conditions)
            hidden, _ = model.backbone(batch)
            targets = torch.from_numpy(np.concatenate([made[i].targets for i in group])).to(model.device)
            at = (targets >= 0).nonzero()[:, 0]
            chosen = _log_probabilities(model, hidden, batch, at).gather(1, targets[at, None])[:, 0]
            sums = chosen.new_zeros(len(batch)).index_add_(0, batch.sequence_ids[at], chosen)
            result[[present[i] for i in group]] = sums.cpu().numpy()
            bar.update(len(group))
    return result


def pseudo_log_likelihood(
    model: LanguageModel,
    records: Sequence[Any],
    *,
    conditions: Mapping[str, int] | None = None,
    batch_tokens: int = 8192,
    progress: bool = False,
) -> NDArray[np.float64]:
    """Return the sum over each record's tokens of log p(token | all the others), each masked in turn (Salazar 2020).

    Special tokens are neither masked nor counted. A record of n tokens takes n passes of its length, packed.

    Returns:
        float64 [records], in nats; NaN where a record is None.

    Raises:
        ConfigError: the model is causal, or has no mask token.
        InputError: a record cannot be encoded.
    """
    _require_masked(model)
    sequences = encode_all(model, records)
    result = np.array([np.nan if sequence is None else 0.0 for sequence in sequences])
    owners, places = [], []
    for index, sequence in enumerate(sequences):
        if sequence is not None:
            at = ordinary(model, torch.as_tensor(np.asarray(sequence, np.int64))).nonzero()[:, 0].numpy()
            owners.append(np.full(len(at), index, np.int64))
            places.append(at)
    owner = np.concatenate(owners) if owners else np.zeros(0, np.int64)
    place = np.concatenate(places) if places else np.zeros(0, np.int64)
    lengths = np.array([0 if sequence is None else len(sequence) for sequence in sequences], np.int64)
    with evaluating(model), tqdm(total=len(owner), disable=not progress, desc="scoring", unit=" tokens") as bar:
        for group in pack(lengths[owner], batch_tokens):
            copies = [np.asarray(sequences[owner[i]], np.int64) for i in group]
            table, truth = _masked_pass(model, copies, torch.from_numpy(place[group]), conditions)
            np.add.at(result, owner[group], table.gather(1, truth[:, None])[:, 0].cpu().numpy())
            bar.update(len(group))
    return result


def position_log_probabilities(
    model: LanguageModel,
    record: Any,
    positions: Sequence[int],
    *,
    masked: bool = True,
    conditions: Mapping[str, int] | None = None,
    batch_tokens: int = 8192,
) -> NDArray[np.float64]:
    """Return log p(token | the rest) for every token of the vocabulary at ``positions`` of one record.

    Args:
        model: a masked model.
        record: what its tokenizer encodes.
        positions: indices into the encoding, special tokens counted, from 0.
        masked: mask each position in turn, a pass for each; False reads all of them off one pass over the record as it
            stands ("wild-type marginals", Meier et al. 2021).
        conditions: ids of conditions that the head of the model knows, such as ``{"species": 3}``.
        batch_tokens: most tokens of one packed batch.

    Returns:
        float64 [positions, vocabulary], in nats.

    Raises:
        ConfigError: the model is causal, or has no mask token.
        InputError: the record cannot be encoded, or has no such position.
    """
    _require_masked(model)
    sequence = np.asarray(model.tokenizer.encode(record), np.int64)
    at = np.asarray(positions, np.int64).reshape(-1)
    if len(at) and not 0 <= at.min() <= at.max() < len(sequence):
        raise InputError(f"The record has token positions 0 to {len(sequence) - 1}, not {at.min()} to {at.max()}.")
    result = np.zeros((len(at), len(model.vocabulary)))
    with evaluating(model):
        if not masked:
            batch = model.whole(PackedBatch.from_sequences([sequence], device=model.device))
            batch = conditioned(model, batch, conditions)
            hidden, _ = model.backbone(batch)
            return _log_probabilities(model, hidden, batch, torch.from_numpy(at).to(model.device)).cpu().numpy()
        for group in pack([len(sequence)] * len(at), batch_tokens):
            table, _ = _masked_pass(model, [sequence] * len(group), torch.from_numpy(at[group]), conditions)
            result[group] = table.cpu().numpy()
    return result


def _require_masked(model: LanguageModel) -> None:
    if model.causal:
        raise ConfigError("Masking needs a bidirectional model; this one is causal: use log_likelihood.")
    model.vocabulary.require("mask")


def _masked_pass(
    model: LanguageModel,
    sequences: Sequence[NDArray[np.int64]],
    at: Int[Tensor, " sequences"],
    conditions: Mapping[str, int] | None,
) -> tuple[Float[Tensor, "sequences vocabulary"], Int[Tensor, " sequences"]]:
    """Mask one token of each sequence; return the log-probabilities there, and the tokens that stood there."""
    batch = model.whole(PackedBatch.from_sequences(sequences, device=model.device))
    batch = conditioned(model, batch, conditions)
    where = batch.cu_seqlens[:-1] + at.to(model.device)
    truth = batch.tokens[where]
    tokens = batch.tokens.index_fill(0, where, model.vocabulary.require("mask"))
    hidden, _ = model.backbone(PackedBatch(tokens, batch.cu_seqlens, batch.positions, batch.conditions))
    return _log_probabilities(model, hidden, batch, where), truth


def _log_probabilities(
    model: LanguageModel, hidden: Tensor, batch: PackedBatch, at: Int[Tensor, " chosen"]
) -> Float[Tensor, "chosen vocabulary"]:
    """Normalised in float64, so that a sum over a long sequence keeps its digits."""
    return torch.log_softmax(model.logits(hidden, batch, at).double(), dim=-1)
