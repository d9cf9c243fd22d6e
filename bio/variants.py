"""Effects of substitutions, named as in ``A42G``: alanine (or adenine) 42, counted from 1, becomes G."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Float64
from numpy.typing import NDArray
from tqdm import tqdm

from ..errors import ConfigError, InputError
from ..sequences import own_part
from .sequence import AMINO_ACIDS

if TYPE_CHECKING:
    from ..models import LanguageModel

Method = Literal["masked-marginal", "wild-type-marginal", "likelihood"]

_SUBSTITUTION = re.compile(r"([A-Z])([1-9][0-9]*)([A-Z])")


class Substitution(NamedTuple):
    """One letter replaced by another, at a position counted from 1."""

    wild_type: str
    position: int
    mutant: str


def parse_variant(variant: str) -> tuple[Substitution, ...]:
    """Read ``A42G``, or several substitutions joined by colons as in ProteinGym: ``A24G:K30R``.

    Raises:
        InputError: it is not of that form, or names a position twice.

    >>> parse_variant("A24G:K30R")
    (Substitution(wild_type='A', position=24, mutant='G'), Substitution(wild_type='K', position=30, mutant='R'))
    """
    substitutions = []
    for part in variant.strip().split(":"):
        match = _SUBSTITUTION.fullmatch(part.strip().upper())
        if match is None:
            raise InputError(
                f"{part!r} is not a substitution.", name=variant, hint="Write A42G, or A24G:K30R for several at once."
            )
        substitutions.append(Substitution(match[1], int(match[2]), match[3]))
    positions = [substitution.position for substitution in substitutions]
    if len(set(positions)) != len(positions):
        twice = next(position for position in positions if positions.count(position) > 1)
        raise InputError("The variant names a position twice.", name=variant, position=twice)
    return tuple(substitutions)


def check_variant(sequence: str, variant: str, *, first: int = 1) -> tuple[Substitution, ...]:
    """Read ``variant``, hold its wild-type letters against ``sequence`` (case is ignored), and count from 1.

    Args:
        sequence: the wild type.
        variant: as in ``parse_variant``.
        first: the number that the variant's author gives the first letter of ``sequence``, when that is a part of a
            longer one (24 for a mature protein behind 23 residues of signal peptide).

    Raises:
        InputError: the variant cannot be read, lies outside the sequence, or names another letter than stands there.
    """
    substitutions = []
    for wild_type, position, mutant in parse_variant(variant):
        place = position - first + 1
        if not 1 <= place <= len(sequence):
            reason = f"The sequence has the positions {first} to {first + len(sequence) - 1} only."
            raise InputError(reason, name=variant, position=position)
        found = sequence[place - 1].upper()
        if found != wild_type:
            raise InputError(
                f"The sequence has {found!r} here, not {wild_type!r}.",
                name=variant,
                position=position,
                hint=f"Positions count from {first}; is this the sequence the variant was named on?",
            )
        substitutions.append(Substitution(wild_type, place, mutant))
    return tuple(substitutions)


def apply_variant(sequence: str, variant: str, *, first: int = 1) -> str:
    """Return ``sequence``, upper case, with the substitutions of ``variant`` made; ``first`` as in ``check_variant``.

    Raises:
        InputError: as ``check_variant``.
    """
    return _substituted(sequence, check_variant(sequence, variant, first=first))


def _substituted(sequence: str, substitutions: Sequence[Substitution]) -> str:
    letters = list(sequence.upper())
    for _, position, mutant in substitutions:
        letters[position - 1] = mutant
    return "".join(letters)


def all_single_variants(sequence: str, letters: str = AMINO_ACIDS) -> list[str]:
    """Every substitution by one of ``letters`` (``bio.BASES`` for DNA), position by position.

    Raises:
        InputError: ``sequence`` holds something else than letters, with its position.
    """
    wild_types = sequence.upper()
    for position, letter in enumerate(wild_types, 1):
        if not "A" <= letter <= "Z":
            raise InputError(f"{letter!r} cannot be substituted.", position=position, hint="Remove gaps and stops.")
    return [
        f"{wild_type}{position}{mutant}"
        for position, wild_type in enumerate(wild_types, 1)
        for mutant in letters
        if mutant != wild_type
    ]


def default_method(model: LanguageModel) -> Method:
    """The method that ``score_variants`` takes for ``model`` when none is named."""
    return "likelihood" if model.causal else "masked-marginal"


def score_variants(
    sequence: str,
    variants: Sequence[str],
    model: LanguageModel,
    *,
    method: Method | None = None,
    first: int = 1,
    batch_tokens: int = 8192,
    progress: bool = False,
) -> Float64[np.ndarray, " variants"]:
    """Log-likelihood ratio of each variant against the wild type, in nats; above 0 the model prefers the variant.

    - "masked-marginal" (Meier et al. 2021): the sum over the variant's sites of log p(mutant) - log p(wild type), each
      site masked alone in the wild type; one forward pass per mutated position.
    - "wild-type-marginal" (ibid.): the same with nothing masked; one forward pass in all.
    - "likelihood": score of the mutant minus score of the wild type: the likelihood for a causal model, the
      pseudo-likelihood for a masked one; one score per variant.

    The marginals need a masked model with one token per letter. None takes what ``default_method`` says.

    Args:
        sequence: the wild type.
        variants: ``A42G`` or ``A24G:K30R`` each.
        model: of proteins or DNA.
        method: see above.
        first: the number that the variants give the first letter of ``sequence``.
        batch_tokens: most tokens of one packed batch.
        progress: show a bar.

    Returns:
        One score per variant, in order.

    Raises:
        InputError: a variant does not fit the sequence, with its number, name and position; or a letter has no token.
        ConfigError: the method does not fit the model.
    """
    method = default_method(model) if method is None else method
    if method not in get_args(Method):
        raise ConfigError(f"A method is one of {', '.join(get_args(Method))}, not {method!r}.")
    model.tokenizer.encode(sequence)
    checked: list[tuple[Substitution, ...]] = []
    letters: set[str] = set()
    for number, variant in enumerate(variants, 1):
        try:
            checked.append(check_variant(sequence, variant, first=first))
            if not letters.issuperset(mutant for _, _, mutant in checked[-1]):
                model.tokenizer.encode(
                    _substituted(sequence, checked[-1])
                )  # once for each letter, not for each variant
        except InputError as error:
            raise error.at(record=number, name=variant) from None
        letters.update(mutant for _, _, mutant in checked[-1])
    if not checked:
        return np.zeros(0)
    if method == "likelihood":
        return _by_likelihood(sequence, checked, model, batch_tokens=batch_tokens, progress=progress)
    return _by_marginals(sequence, checked, model, method, batch_tokens=batch_tokens, progress=progress)


def _by_likelihood(
    sequence: str,
    variants: Sequence[tuple[Substitution, ...]],
    model: LanguageModel,
    *,
    batch_tokens: int,
    progress: bool,
) -> NDArray[np.float64]:
    from ..inference import score

    mutants = [_substituted(sequence, variant) for variant in variants]
    scores = score(model, [sequence.upper(), *mutants], batch_tokens=batch_tokens, progress=progress)
    effects: NDArray[np.float64] = scores[1:] - scores[0]
    return effects


def _by_marginals(
    sequence: str,
    variants: Sequence[tuple[Substitution, ...]],
    model: LanguageModel,
    method: Method,
    *,
    batch_tokens: int,
    progress: bool,
) -> NDArray[np.float64]:
    from ..inference import position_log_probabilities

    tokenizer = model.tokenizer
    if model.causal:
        raise ConfigError(f"The method {method!r} needs a masked model; this one is causal: take 'likelihood'.")
    if getattr(tokenizer, "letters_per_token", None) != 1:
        raise ConfigError(f"The method {method!r} needs one token per letter; take 'likelihood'.")
    positions = sorted({substitution.position for variant in variants for substitution in variant})
    masked = method == "masked-marginal"
    step = max(1, batch_tokens // (len(sequence) + 2)) if masked else len(positions)
    parts = []
    before = own_part(tokenizer.encode(sequence), tokenizer.vocabulary)[0]
    for first in tqdm(range(0, len(positions), step), disable=not progress, desc="scoring", unit=" batches"):
        at = [before + position - 1 for position in positions[first : first + step]]
        parts.append(position_log_probabilities(model, sequence.upper(), at, masked=masked, batch_tokens=batch_tokens))
    log_p = np.concatenate(parts)
    row = {position: i for i, position in enumerate(positions)}
    ids = tokenizer.vocabulary.ids
    return np.array(
        [
            sum(log_p[row[position], ids[mutant]] - log_p[row[position], ids[wt]] for wt, position, mutant in variant)
            for variant in variants
        ],
        np.float64,
    )
