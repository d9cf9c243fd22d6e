"""Both strands: a verb's result averaged over a sequence and its reverse complement.

Post-hoc equivariance (Zhou et al. 2022, https://proceedings.mlr.press/v165/zhou22a.html): whatever the model, what is
averaged is the same for either strand, with rows of tokens in reverse order and logits those of the complements. It
needs no model trained for it; one with a ``complement`` in its backbone is equivariant by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, InputError
from ..sequences import Tokenizer
from .sequence import reverse_complement

Texts = list[str | None]


def over_both_strands(verb: Callable[[Texts], Any], texts: Texts, tokenizer: Tokenizer) -> Any:
    """Return the mean of what ``verb`` gives for the texts and for their reverse complements.

    Its results are arrays with a row for each text, or (layer by layer) lists of them.

    Raises:
        ConfigError: the tokenizer does not read DNA.
    """
    other = _other_strands(texts, tokenizer)
    return _mean(verb(texts), verb(other))


def over_both_strands_by_token(
    verb: Callable[[Texts], Any], texts: Texts, tokenizer: Tokenizer, *, complement: Sequence[int] | None = None
) -> Any:
    """Return the same for a verb with a row for each token; ``complement`` permutes the columns of the other strand.

    Raises:
        ConfigError: the tokenizer does not read DNA.
        InputError: the tokens of the other strand are not those of this one, as with k-mers and a tail.
    """
    other = _other_strands(texts, tokenizer)
    for number, (text, reverse) in enumerate(zip(texts, other, strict=True), 1):
        if text is not None and reverse is not None:
            _check_aligned(text, reverse, tokenizer, number)
    columns = slice(None) if complement is None else list(complement)
    return _mean(verb(texts), _turned(verb(other), columns))


def complement_of(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the id of the reverse complement of each token.

    Raises:
        ConfigError: the tokenizer does not read DNA.
    """
    ids: tuple[int, ...] | None = getattr(tokenizer, "complement", None)
    if ids is None:
        raise ConfigError(f"The tokenizer {tokenizer.name!r} does not read DNA: there is no other strand.")
    return ids


def _other_strands(texts: Texts, tokenizer: Tokenizer) -> Texts:
    complement_of(tokenizer)
    return [None if text is None else reverse_complement(text) for text in texts]


def _check_aligned(text: str, reverse: str, tokenizer: Tokenizer, number: int) -> None:
    special = sorted(tokenizer.vocabulary.special_ids)
    own, other = (np.asarray(ids)[~np.isin(ids, special)] for ids in map(tokenizer.encode, (text, reverse)))
    if len(own) != len(other) or (np.asarray(complement_of(tokenizer))[own[::-1]] != other).any():
        raise InputError(
            "Its tokens are not those of the other strand: k-mers are counted from the first base of either.",
            record=number,
            hint="Cut it to a length that is a multiple of k, or pool over the sequence.",
        )


def _mean(own: Any, other: Any) -> Any:
    if isinstance(own, list):
        return [_mean(a, b) for a, b in zip(own, other, strict=True)]
    mean: NDArray[np.floating] = (own + other) / 2
    return mean


def _turned(value: Any, columns: Any) -> Any:
    return [_turned(part, columns) for part in value] if isinstance(value, list) else value[::-1, columns]
