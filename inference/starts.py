"""What a generated sequence begins with, and how it ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, InputError
from ..models import LanguageModel
from ..sequences import Blanked, blanked, own_part, require_blanks, without_blanks
from ..sequences.blanks import END, LONG, SHORT


class Start(NamedTuple):
    """One beginning.

    Attributes:
        read: what the model reads before the first token that it draws.
        before: tokens of the result before the drawn ones.
        after: tokens of the result behind them.
    """

    read: Blanked
    before: NDArray[np.int64]
    after: NDArray[np.int64]


def require_writing(model: LanguageModel) -> None:
    """Raise ``ConfigError`` unless the model writes sequences."""
    if not model.generates:
        raise ConfigError("Only a causal model, or one that reads a prefix, generates; this one is bidirectional.")
    if not model.causal:
        require_blanks(model.vocabulary, "A model that reads a prefix writes into blanks: it")


def starts_of(
    model: LanguageModel, prompts: str | Sequence[str] | None, suffixes: str | Sequence[str] | None
) -> list[Start]:
    """Return the beginning of each prompt.

    A causal model goes on from the prompt, without an end token. A model that reads a prefix sees the prompt, one mask
    and the suffix, and writes in place of the mask: of ``<gmask>`` where there is no suffix, else of ``<smask>``.

    Raises:
        InputError: a prompt or a suffix cannot be encoded, or there is nothing to continue.
        ConfigError: the model fills in nothing, or there are not as many suffixes as prompts.
    """
    if model.causal:
        if suffixes is not None:
            raise ConfigError("A suffix is for a model that fills in (direction 'prefix'); this one is causal.")
        return [_continued(start) for start in _beginnings(model, prompts)]
    firsts = _texts("" if prompts is None else prompts)
    lasts = _texts("" if suffixes is None else suffixes)
    if isinstance(suffixes, str) or suffixes is None:
        lasts = lasts * len(firsts)
    elif prompts is None or isinstance(prompts, str):
        firsts = firsts * len(lasts)
    if len(firsts) != len(lasts):
        raise ConfigError(
            f"There are {len(firsts)} prompts and {len(lasts)} suffixes: give one suffix for each, or one."
        )
    return [_around(model, *pair, number) for number, pair in enumerate(zip(firsts, lasts, strict=True), 1)]


def _texts(given: str | Sequence[str]) -> list[str]:
    return [given] if isinstance(given, str) else list(given)


def _encoded(model: LanguageModel, text: str, name: str) -> NDArray[np.int64]:
    try:
        return np.asarray(model.tokenizer.encode(text), np.int64)
    except InputError as error:
        raise error.at(name=name) from None


def _beginnings(model: LanguageModel, prompts: str | Sequence[str] | None) -> list[NDArray[np.int64]]:
    """Token ids of each prompt, without an end token."""
    if prompts is None:
        return [np.array([model.vocabulary.require("bos")])]
    end, starts = model.vocabulary.role("eos"), []
    for number, prompt in enumerate(_texts(prompts), 1):
        ids = _encoded(model, prompt, f"prompt {number}")
        start = ids[:-1] if len(ids) and ids[-1] == end else ids
        if not len(start):
            raise InputError("There is nothing to continue.", name=f"prompt {number}")
        starts.append(start)
    return starts


def _continued(start: NDArray[np.int64]) -> Start:
    return Start(without_blanks(start), start, start[:0])


def _around(model: LanguageModel, prompt: str, suffix: str, number: int) -> Start:
    first, last = _encoded(model, prompt, f"prompt {number}"), _encoded(model, suffix, f"suffix {number}")
    first = first[: own_part(first, model.vocabulary)[1]]
    last = last[own_part(last, model.vocabulary)[0] :]
    place = len(first), len(first)
    read = blanked(np.concatenate([first, last]), [place], SHORT if suffix else LONG, model.vocabulary)
    return Start(read, first, last)


def ends_of(model: LanguageModel, stop: str | Sequence[str] | None) -> list[int]:
    """Return the ids of the tokens that end a sequence: the end of a blank where one is written, and ``stop``."""
    tokens = [] if stop is None else _texts(stop)
    unknown = [token for token in tokens if token not in model.vocabulary.ids]
    if unknown:
        raise ConfigError(f"stop names tokens of the vocabulary, and {unknown[0]!r} is none.")
    end = model.vocabulary.role("eos") if model.causal else model.vocabulary.ids[END]
    return [model.vocabulary.ids[token] for token in tokens] + ([] if end is None else [end])
