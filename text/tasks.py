"""The verbs of text: tokenize, embed, score, generate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Float64

from ..errors import ConfigError, InputError
from ..sequences import Record, Spanned, TextTokenizer, Tokenizer, texts_of
from .readers import encode_text

if TYPE_CHECKING:
    from ..models import LanguageModel


def make_tokenizer(settings: Mapping[str, Any], records: Sequence[Record] = ()) -> TextTokenizer:
    """Make the tokenizer of a recipe's ``[tokenizer]`` table.

    Args:
        settings: ``path`` (a model's folder, or its tokenizer.model), or ``pieces`` (single bytes, and these texts as
            tokens of their own); ``name`` must be "text" where it stands.
        records: the training input; no tokenizer of text learns from it.

    Raises:
        ConfigError: the table names another tokenizer or an unknown setting, or nothing to make one of.
    """
    unknown = sorted(set(settings) - {"name", "path", "pieces"})
    if unknown:
        raise ConfigError(f"Unknown tokenizer setting {unknown[0]!r}; known are name, path and pieces.")
    if settings.get("name", TextTokenizer.name) != TextTokenizer.name:
        raise ConfigError(f"Text is tokenized by {TextTokenizer.name!r}, not {settings['name']!r}.")
    if ("path" in settings) == ("pieces" in settings):
        raise ConfigError(
            "A tokenizer of text comes with a model: train from it (--base MODEL), or name its folder or file "
            "(--set tokenizer.path=...); or pieces make one of bytes."
        )
    if "pieces" in settings:
        return TextTokenizer.from_pieces(settings["pieces"])
    path = Path(settings["path"])
    if path.is_file() and path.suffix == ".model":
        return TextTokenizer.from_sentencepiece(path)
    return TextTokenizer.from_folder(path)


def tokenize(records: Sequence[Record], tokenizer: TextTokenizer) -> Spanned:
    """Token ids of every usable text, and where its answer is; those with a problem are left out.

    A text ends with the end token, where there is one. What of it is learned by the objective "answer" is the span of
    each sequence: of an instruction the answer, of another text all of it.

    Raises:
        InputError: the tokenizer refuses a text, with its number and position.
    """
    sequences, spans = [], []
    for record in records:
        if record.problem is None:
            try:
                ids, own = encode_text(record, tokenizer)
            except InputError as error:
                raise error.at(record=record.number, name=record.name or None) from None
            sequences.append(ids)
            spans.append(own or [])
    return Spanned(sequences, spans)


def embed(
    records: Sequence[Record | str],
    model: LanguageModel,
    *,
    layer: int | Sequence[int] = -1,
    pooling: Literal["mean", "last", "tokens"] = "mean",
    batch_tokens: int = 8192,
    progress: bool = False,
) -> Any:
    """Hidden states of a model for each text, special tokens left out.

    Returns:
        float32 [records, width], a row of NaN for a record with a problem; with "tokens" a list of float32 [tokens,
        width]. A list of these, one per layer, when ``layer`` names several.

    Raises:
        ConfigError: the model does not read text.
        InputError: the tokenizer refuses a text.
    """
    from ..inference import embed as embed_texts

    texts = _texts(records, model.tokenizer)
    return embed_texts(model, texts, layer=layer, pooling=pooling, batch_tokens=batch_tokens, progress=progress)


def score(
    records: Sequence[Record | str], model: LanguageModel, *, batch_tokens: int = 8192, progress: bool = False
) -> Float64[np.ndarray, " records"]:
    """Log-likelihood of each text in nats (a masked model: pseudo-log-likelihood).

    Returns:
        float64 [records], NaN for a record with a problem.

    Raises:
        ConfigError: the model does not read text.
        InputError: the tokenizer refuses a text.
    """
    from ..inference import score as score_texts

    texts = _texts(records, model.tokenizer)
    scores: Float64[np.ndarray, " records"] = score_texts(model, texts, batch_tokens=batch_tokens, progress=progress)
    return scores


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
    """Sample ``count`` texts from a causal model, prompts included; see ``processive.inference.generate``.

    Raises:
        ConfigError: the model does not read text, is not causal, or an option cannot work.
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
        progress=progress,
    )


def _texts(records: Sequence[Record | str], tokenizer: Tokenizer) -> list[str | None]:
    _of_this_domain(tokenizer)
    return texts_of(records, tokenizer.encode, what="text")


def _of_this_domain(tokenizer: Tokenizer) -> None:
    if tokenizer.domain != "text":
        raise ConfigError(f"The tokenizer {tokenizer.name!r} does not read text.")
