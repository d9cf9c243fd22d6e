"""The verbs for DNA and proteins: tokenize, embed, score, logits, generate."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Float64
from numpy.typing import NDArray

from ..errors import ConfigError, InputError
from ..sequences import Record, Spanned, Tokenizer, texts_of, token_lengths, token_spans, tokenizer_from_dict
from .frames import check_frames_alone, encode_frames
from .sequence import guess_alphabet
from .spans import SpanTable, spans_by_record
from .strands import Texts, complement_of, over_both_strands, over_both_strands_by_token

if TYPE_CHECKING:
    from ..models import LanguageModel


def make_tokenizer(settings: Mapping[str, Any], records: Sequence[Record] = ()) -> Tokenizer:
    """Make the tokenizer of a recipe's ``[tokenizer]`` table: ``name`` (dna, dna-kmer, protein) and its options.

    ``records`` is the training input; no tokenizer of this domain learns from it.

    Raises:
        ConfigError: the table names no tokenizer of DNA or proteins, or an option it does not have.
    """
    if "name" not in settings:
        raise ConfigError("The tokenizer table names no tokenizer: dna, dna-kmer or protein.")
    return _of_this_domain(tokenizer_from_dict(settings))


def tokenize(
    records: Sequence[Record], tokenizer: Tokenizer, *, spans: SpanTable | None = None, frames: int | None = None
) -> list[NDArray[np.int32]] | Spanned:
    """Token ids of every usable record; those with a problem are left out.

    Args:
        records: what ``read`` gave.
        tokenizer: of DNA or proteins.
        spans: spans of residues or bases by the names of records, see ``read_spans``; the sequences then know them.
        frames: of DNA in k-mers: the sequences of so many frames, one after the other, see ``frames.in_frames``.

    Raises:
        InputError: the tokenizer refuses a record, with its number, name and position; or spans are of no record, or
            end beyond theirs.
        ConfigError: spans and frames are both given, or the tokenizer has no frames.
    """
    usable = [record for record in records if record.problem is None]
    if frames is not None:
        check_frames_alone(spans)
        return [ids for record in usable for ids in encode_frames(record, tokenizer, frames)]
    sequences = [_encode(tokenizer, record) for record in usable]
    if spans is None:
        return sequences
    lengths = token_lengths(tokenizer.vocabulary)
    of_each = spans_by_record(usable, spans)
    return Spanned(
        sequences,
        [
            token_spans(own, ids, lengths, what=f"Record {record.number} ({record.name})")
            for record, ids, own in zip(usable, sequences, of_each, strict=True)
        ],
    )


def embed(
    records: Sequence[Record | str],
    model: LanguageModel,
    *,
    layer: int | Sequence[int] = -1,
    pooling: Literal["mean", "last", "tokens"] = "mean",
    both_strands: bool = False,
    batch_tokens: int = 8192,
    progress: bool = False,
) -> Any:
    """Hidden states of a model for each sequence, begin and end tokens left out.

    Args:
        records: what ``read`` gave, or plain strings.
        model: of DNA or proteins.
        layer: which hidden states: 0 the token embeddings, then after each block, -1 the last; or several of them.
        pooling: "mean" over the residues, the "last" one, or "tokens" for each of them.
        both_strands: of DNA: average with the reverse complement, so that either strand has the same embedding (with
            "tokens", the same rows in reverse order).
        batch_tokens: most tokens of one packed batch.
        progress: show a bar.

    Returns:
        float32 [records, width], a row of NaN for a record with a problem; with "tokens" a list of float32 [residues,
        width], without rows for such a record. A list of these, one per layer, when ``layer`` names several.

    Raises:
        InputError: the tokenizer refuses a sequence, with its number, name and position, or cuts the other strand into
            other tokens (k-mers and "tokens").
        ConfigError: the model does not read DNA or proteins, or not DNA with ``both_strands``, or has no such layer.
    """
    from ..inference import embed as embed_texts

    texts = checked_texts(records, model.tokenizer)

    def run(texts: Texts) -> Any:
        return embed_texts(model, texts, layer=layer, pooling=pooling, batch_tokens=batch_tokens, progress=progress)

    if not both_strands:
        return run(texts)
    average = over_both_strands_by_token if pooling == "tokens" else over_both_strands
    return average(run, texts, model.tokenizer)


def score(
    records: Sequence[Record | str],
    model: LanguageModel,
    *,
    both_strands: bool = False,
    conditions: Mapping[str, int] | None = None,
    batch_tokens: int = 8192,
    progress: bool = False,
) -> Float64[np.ndarray, " records"]:
    """Log-likelihood of each sequence in nats, end token included; the pseudo-log-likelihood for a masked model.

    With ``both_strands`` the mean of that of a DNA sequence and that of its reverse complement. ``conditions`` are ids
    of conditions that the head of the model knows, such as ``{"species": 3}``.

    Returns:
        float64 [records], NaN for a record with a problem.

    Raises:
        InputError: the tokenizer refuses a sequence, with its number, name and position.
        ConfigError: the model does not read DNA or proteins, or not DNA with ``both_strands``, or knows no such
            condition.
    """
    from ..inference import score as score_texts

    texts = checked_texts(records, model.tokenizer)

    def run(texts: Texts) -> Any:
        return score_texts(model, texts, conditions=conditions, batch_tokens=batch_tokens, progress=progress)

    scores: Float64[np.ndarray, " records"]
    scores = over_both_strands(run, texts, model.tokenizer) if both_strands else run(texts)
    return scores


def logits(
    records: Sequence[Record | str],
    model: LanguageModel,
    *,
    both_strands: bool = False,
    conditions: Mapping[str, int] | None = None,
    batch_tokens: int = 8192,
    progress: bool = False,
) -> list[NDArray[np.float32]]:
    """Logits of a masked model at each residue of each sequence, begin and end tokens left out.

    With ``both_strands`` the mean with those of the reverse complement at the same base, of the complements: the logits
    of the other strand are then those of the complements, in reverse order. ``conditions`` as in ``score``.

    Returns:
        float32 [residues, vocabulary] of each record, without rows for one with a problem.

    Raises:
        InputError: the tokenizer refuses a sequence, with its number, name and position, or cuts the other strand into
            other tokens (k-mers).
        ConfigError: the model does not read DNA or proteins, or not DNA with ``both_strands``, is causal, or knows no
            such condition.
    """
    from ..inference import logits as logits_of_texts

    texts = checked_texts(records, model.tokenizer)
    if model.causal:
        raise ConfigError("A causal model has logits for the next residue, not for the one it reads: use score.")

    def run(texts: Texts) -> list[NDArray[np.float32]]:
        return logits_of_texts(model, texts, conditions=conditions, batch_tokens=batch_tokens, progress=progress)

    if not both_strands:
        return run(texts)
    rows: list[NDArray[np.float32]]
    rows = over_both_strands_by_token(run, texts, model.tokenizer, complement=complement_of(model.tokenizer))
    return rows


def generate(
    model: LanguageModel,
    count: int | None = None,
    *,
    prompts: str | Sequence[str] | None = None,
    suffixes: str | Sequence[str] | None = None,
    gaps: int | Sequence[int] | None = None,
    temperature: float | int = 1.0,
    top_k: int | None = None,
    top_p: float | int | None = None,
    min_p: float | int | None = None,
    max_length: int = 512,
    stop: str | Sequence[str] | None = None,
    seed: int = 0,
    batch_size: int = 256,
    conditions: Mapping[str, int] | None = None,
    progress: bool = False,
) -> list[str]:
    """Sample ``count`` sequences, upper case, from a causal model of DNA or proteins, or one that reads a prefix.

    Options, and the order of the result under ``prompts``, are those of ``processive.inference.generate``.

    Raises:
        ConfigError: the model does not read DNA or proteins, is bidirectional, or an option cannot work.
    """
    from ..inference import generate as generate_texts

    _of_this_domain(model.tokenizer)
    return generate_texts(
        model,
        count,
        prompts=prompts,
        suffixes=suffixes,
        gaps=gaps,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        max_length=max_length,
        stop=stop,
        seed=seed,
        batch_size=batch_size,
        conditions=conditions,
        progress=progress,
    )


def checked_texts(records: Sequence[Record | str], tokenizer: Tokenizer) -> list[str | None]:
    """Texts of the records, None for one with a problem; see ``sequences.texts_of``. Warns of DNA given as proteins."""
    _of_this_domain(tokenizer)
    texts = texts_of(records, partial(_encode_text, tokenizer), what="sequence")
    usable = [text for text in texts if text is not None]
    if usable and getattr(tokenizer, "alphabet", None) == "protein" and guess_alphabet(usable) == "dna":
        warnings.warn("These sequences look like DNA, and the model reads proteins: translate them?", stacklevel=3)
    return texts


def _encode_text(tokenizer: Tokenizer, text: str) -> NDArray[np.int32]:
    if not text:
        raise InputError("The sequence is empty.")
    return tokenizer.encode(text)


def _encode(tokenizer: Tokenizer, record: Record) -> NDArray[np.int32]:
    try:
        return _encode_text(tokenizer, record.text)
    except InputError as error:
        raise error.at(record=record.number, name=record.name or None) from None


def _of_this_domain(tokenizer: Tokenizer) -> Tokenizer:
    if tokenizer.domain != "bio":
        raise ConfigError(f"The tokenizer {tokenizer.name!r} does not read DNA or proteins.")
    return tokenizer
