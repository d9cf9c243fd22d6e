"""What a generated sequence begins with, and how it ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, InputError
from ..models import LanguageModel
from ..sequences import Blanked, blanked, fills_in, move_spans_behind, own_part, require_blanks, without_blanks
from ..sequences.blanks import END, LONG, SHORT


class Start(NamedTuple):
    """One beginning.

    Attributes:
        read: what the model reads before the first token that it draws.
        before: tokens of the result before the drawn ones.
        after: tokens of the result behind them.
        places: the position of each token that may be drawn; they count up, but that the last may repeat itself.
    """

    read: Blanked
    before: NDArray[np.int64]
    after: NDArray[np.int64]
    places: Sequence[int]


def require_writing(model: LanguageModel) -> None:
    """Raise ``ConfigError`` unless the model writes sequences."""
    if not model.generates:
        raise ConfigError("Only a causal model, or one that reads a prefix, generates; this one is bidirectional.")
    if not model.causal:
        require_blanks(model.vocabulary, "A model that reads a prefix writes into blanks: it")


def starts_of(
    model: LanguageModel,
    prompts: str | Sequence[str] | None,
    suffixes: str | Sequence[str] | None,
    gaps: int | Sequence[int] | None,
    max_length: int,
) -> list[Start]:
    """Return the beginning of each prompt.

    A causal model goes on from the prompt, without an end token. With a suffix or a gap it reads both and fills in what
    lies between, as ``objectives.fill_in`` trains it to. A model that reads a prefix sees the prompt, one mask and the
    suffix, and writes in place of the mask: of ``<gmask>`` where there is no suffix, else of ``<smask>``.

    Raises:
        InputError: a prompt or a suffix cannot be encoded, or there is nothing to continue.
        ConfigError: the model fills in nothing, is not told how long a gap is or need not be told, or there are not as
            many of one thing as of another.
    """
    if model.causal and suffixes is None and gaps is None:
        return [_continued(start, max_length) for start in _beginnings(model, prompts)]
    _check_gaps(model, gaps)
    given = {"prompts": "" if prompts is None else prompts, "suffixes": "" if suffixes is None else suffixes}
    rows = _in_rows({**given, "gaps": max_length if gaps is None else gaps})
    return [
        (_within if model.causal else _around)(model, *_ends(model, first, last, number), gap)
        for number, (first, last, gap) in enumerate(rows, 1)
    ]


def _check_gaps(model: LanguageModel, gaps: int | Sequence[int] | None) -> None:
    if not model.causal:
        if gaps is not None:
            raise ConfigError("A model that reads a prefix is not told how long a gap is: it decides. Leave gaps out.")
        return
    if not fills_in(model.vocabulary):
        raise ConfigError(
            "A suffix or a gap is for a model that fills in: one that reads a prefix (direction 'prefix'), or a causal "
            "one whose tokenizer has <mask-1> and <eos> (recipe prot-xlstm). This one is causal, and its tokenizer "
            "has not."
        )
    if gaps is None and model.backbone.config.positional:
        raise ConfigError(
            "What follows a gap has its position in the whole sequence, and this model's numbers depend on it: say how "
            "many tokens are missing with gaps (on the command line --gap)."
        )
    if gaps is not None and min([gaps] if isinstance(gaps, int) else gaps, default=1) < 1:
        raise ConfigError("A gap has at least 1 token.")


def _texts(given: str | Sequence[str]) -> list[str]:
    return [given] if isinstance(given, str) else list(given)


def _in_rows(given: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """Return the first of each, the second of each, ...; a text or number by itself is that of all rows."""
    lists = {name: list(some) for name, some in given.items() if not isinstance(some, str | int)}
    if len(set(map(len, lists.values()))) > 1:
        counts = " and ".join(f"{len(some)} {name}" for name, some in lists.items())
        raise ConfigError(f"There are {counts}: give as many of each, or one for all.")
    count = len(next(iter(lists.values()), [None]))
    return list(zip(*(lists.get(name, [some] * count) for name, some in given.items()), strict=True))


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


def _continued(start: NDArray[np.int64], max_length: int) -> Start:
    return Start(without_blanks(start), start, start[:0], range(len(start), len(start) + max_length))


def _ends(model: LanguageModel, prompt: str, suffix: str, number: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Tokens before a gap, and those behind it with the end token."""
    first, last = _encoded(model, prompt, f"prompt {number}"), _encoded(model, suffix, f"suffix {number}")
    return first[: own_part(first, model.vocabulary)[1]], last[own_part(last, model.vocabulary)[0] :]


def _around(model: LanguageModel, first: NDArray[np.int64], last: NDArray[np.int64], most: int) -> Start:
    """A blank between two parts, of at most so many tokens."""
    own = own_part(last, model.vocabulary)
    mask = SHORT if own[0] < own[1] else LONG
    read = blanked(np.concatenate([first, last]), [(len(first), len(first))], mask, model.vocabulary)
    place = int(read.positions[-1]) + 1
    return Start(read, first, last, range(place, place + most))


def _within(model: LanguageModel, first: NDArray[np.int64], last: NDArray[np.int64], gap: int) -> Start:
    """A gap of so many tokens between two parts, as the span that would stand there is laid out in training."""
    whole = np.concatenate([first, np.zeros(gap, np.int64), last])
    tokens, positions = move_spans_behind(whole, [(len(first), len(first) + gap)], model.vocabulary)
    read = without_blanks(tokens[:-gap])._replace(positions=positions[:-gap])
    return Start(read, first, last, positions[-gap:].tolist())


def ends_of(model: LanguageModel, stop: str | Sequence[str] | None, gaps: int | Sequence[int] | None) -> list[int]:
    """Return the ids of the tokens that end a sequence: the end of a blank where one is written, and ``stop``.

    A gap of a known length ends when it is full, and at no token but ``stop``.
    """
    tokens = [] if stop is None else _texts(stop)
    unknown = [token for token in tokens if token not in model.vocabulary.ids]
    if unknown:
        raise ConfigError(f"stop names tokens of the vocabulary, and {unknown[0]!r} is none.")
    end = model.vocabulary.role("eos") if model.causal else model.vocabulary.ids[END]
    own = [] if end is None or gaps is not None else [end]
    return [model.vocabulary.ids[token] for token in tokens] + own
