"""The verbs of chem: tokenize, embed, score, generate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, InputError
from ..sequences import Record, Tokenizer
from .tokenizer import SmilesTokenizer

if TYPE_CHECKING:
    from ..models import LanguageModel


def make_tokenizer(settings: Mapping[str, Any], records: Sequence[Record | str]) -> SmilesTokenizer:
    """Make the tokenizer that a recipe's ``[tokenizer]`` table asks for.

    The vocabulary is fixed, so ``records`` (the training input) has no say in it.

    Raises:
        ConfigError: a setting that does not exist, or another tokenizer's name.
    """
    del records
    if settings.get("name", SmilesTokenizer.name) != SmilesTokenizer.name:
        raise ConfigError(f"chem has the tokenizer {SmilesTokenizer.name!r}, not {settings['name']!r}.")
    return SmilesTokenizer.from_dict({key: value for key, value in settings.items() if key != "name"})


def tokenize(records: Sequence[Record | str], tokenizer: Tokenizer) -> list[NDArray[np.int32]]:
    """Token ids of every usable record, in order.

    Raises:
        InputError: a string cannot be tokenized; it names the record and the position.
    """
    return [ids for ids in _encoded(records, tokenizer) if ids is not None]


def _encoded(records: Sequence[Record | str], tokenizer: Tokenizer) -> list[NDArray[np.int32] | None]:
    """Token ids of each record, None for one with a problem."""
    if isinstance(records, str):
        raise ConfigError("Give a list of SMILES; this is a single string.")
    found: list[NDArray[np.int32] | None] = []
    for number, record in enumerate(records, 1):
        if not isinstance(record, str):
            found.append(None if record.problem is not None else tokenizer.encode(record.text))
            continue
        try:
            found.append(tokenizer.encode(record))
        except InputError as error:
            raise error.at(record=number) from None
    return found


def _texts(records: Sequence[Record | str], model: LanguageModel) -> list[str | None]:
    """The text of each record, None for one with a problem; checked before any time goes into the others."""
    if model.tokenizer.domain != "chem":
        raise ConfigError(f"{model.name} reads {model.tokenizer.domain!r} input, not molecules.")
    texts = [record if isinstance(record, str) else record.text for record in records]
    encoded = _encoded(records, model.tokenizer)
    return [text if ids is not None else None for text, ids in zip(texts, encoded, strict=True)]


def embed(
    records: Sequence[Record | str],
    model: LanguageModel,
    *,
    layer: int = -1,
    pooling: Literal["mean", "last", "tokens"] = "mean",
    progress: bool = False,
) -> NDArray[np.float32] | list[NDArray[np.float32]]:
    """Embed molecules.

    Args:
        records: what ``read`` returned, or SMILES.
        model: a language model of chem.
        layer: which hidden states, 0 for the embeddings, -1 for the last.
        pooling: "mean" or "last" over a molecule's tokens, specials left out, or "tokens" for each.
        progress: show a progress bar.

    Returns:
        float32 [records, width], NaN for a record with a problem; a list of [tokens, width] for "tokens".

    Raises:
        ConfigError: the model is not one of molecules.
        InputError: a string cannot be tokenized; it names the record and the position.
    """
    from .. import inference

    return inference.embed(model, _texts(records, model), layer=layer, pooling=pooling, progress=progress)


def score(records: Sequence[Record | str], model: LanguageModel, *, progress: bool = False) -> NDArray[np.float64]:
    """Log-likelihood of each molecule in nats, summed over its tokens (pseudo-log-likelihood for a masked model).

    It is that of the string as it is written: two SMILES of one molecule differ.

    Returns:
        float64 [records], NaN for a record with a problem.

    Raises:
        ConfigError: the model is not one of molecules.
        InputError: a string cannot be tokenized; it names the record and the position.
    """
    from .. import inference

    return inference.score(model, _texts(records, model), progress=progress)


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
    progress: bool = False,
) -> list[str]:
    """Generate SMILES, as they come: ``report`` says how many are molecules.

    Args:
        model: a causal language model of chem.
        count: how many, or how many per prompt.
        prompts: SMILES beginnings to go on from; the result includes them.
        suffixes: ends to lead to, for a model that fills in; see ``inference.generate``.
        gaps: tokens to put before them, where the model must be told; see ``inference.generate``.
        temperature: 1 samples the model's own distribution, lower is safer and less diverse.
        top_k: sample from the k likeliest tokens only.
        top_p: sample from the likeliest tokens that make up this share of the probability.
        min_p: sample from the tokens at least this likely, relative to the likeliest.
        max_length: tokens after which a string is cut.
        stop: text at which a string ends.
        seed: equal seeds give equal strings.
        batch_size: strings sampled at a time.
        progress: show a progress bar.

    Raises:
        ConfigError: the model is not one of molecules, or is not causal.
        InputError: a prompt cannot be tokenized.
    """
    from .. import inference

    if model.tokenizer.domain != "chem":
        raise ConfigError(f"{model.name} writes {model.tokenizer.domain!r} output, not molecules.")
    return inference.generate(
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
        progress=progress,
    )
