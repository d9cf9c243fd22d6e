"""Sequences of which some are preferred: what an assay measured, or pairs; learned by DPO."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import ConfigError, InputError
from ..models import LanguageModel, Trainable
from ..sequences import PackedBatch, Tokenizer, pack
from .objectives import Objective, causal, preference_loss, sequence_log_likelihoods
from .taught import Taught, TaughtObjective, Tokens, encoded, hashed, language_model

MARGINALS = ("wild-type-marginal", "masked-marginal")


@dataclass(frozen=True)
class WildType:
    """What a masked model compares variants with.

    Attributes:
        tokens: of the wild type.
        marginal: see ``Preferences``.
    """

    tokens: NDArray[np.int64]
    marginal: str


class Preferences(Taught):
    """Sequences with a value each: of any two in a batch, the one with the higher value is preferred.

    All pairs in a batch are counted, so that a sequence is read once for many of them (g-DPO groups likelihoods in the
    same way). ``groups`` says which sequences may be compared, and keeps each group in one batch; given pairs are
    groups of two (``of_pairs``).

    The likelihood that a causal model gives a sequence is that of all its tokens. A masked model has none; it needs the
    ``wild_type`` that all sequences are variants of, and has the ratio to it (Meier et al. 2021):

        sum over the tokens t that differ of log p(x_t | context) - log p(wild_t | context)

    The context is the wild type as it is ("wild-type-marginal"), read once for all variants of a batch, or with these
    tokens masked ("masked-marginal"), read once for each site: take the one by which variants are scored later
    (``bio.score_variants``). Batches are filled as if each variant were read, so that one of 50,000 tokens is small.

    >>> data = Preferences.encode(tokenizer, variants, activity, gap=0.3, wild_type=wild_type).with_reference(model)
    >>> train(model, data, TrainingConfig(epochs=40, batch_tokens=60_000, learning_rate=1e-4), out="runs/preferring")

    Args:
        sequences: token sequences, of at least two tokens.
        values: what was measured of each, more being better, [sequences]; NaN is not compared.
        gap: two are compared where their values differ by more; twice the deviation of replicates is above the noise.
        beta: how strongly the model is held to its reference: less lets it go further.
        groups: of each sequence, [sequences]; None: any two are compared.
        wild_type: tokens of the wild type, for a masked model.
        marginal: "wild-type-marginal" or "masked-marginal", for a masked model.
        reference: the log-likelihoods before training; ``with_reference`` computes them.

    Raises:
        InputError: there are no two sequences to compare; lengths disagree; by the record's number.
        ConfigError: ``gap`` is negative, ``beta`` not positive, or there is no such marginal.
    """

    def __init__(
        self,
        sequences: Sequence[Tokens],
        values: ArrayLike,
        *,
        gap: float | int = 0.0,
        beta: float | int = 0.1,
        groups: Sequence[Hashable] | None = None,
        wild_type: Tokens | None = None,
        marginal: str = "wild-type-marginal",
        reference: ArrayLike | None = None,
    ) -> None:
        if marginal not in MARGINALS:
            raise ConfigError(f"marginal is {marginal!r}; it can be {', '.join(MARGINALS)}.")
        if gap < 0 or not beta > 0:
            raise ConfigError(f"gap is at least 0 and beta positive, not {gap} and {beta}.")
        measured = np.asarray(values, np.float64)
        if measured.shape != (len(sequences),):
            raise InputError(f"The values have shape {list(measured.shape)}; there are {len(sequences)} sequences.")
        if groups is not None and len(groups) != len(sequences):
            raise InputError(f"There are {len(groups)} groups, and {len(sequences)} sequences.")
        for number, sequence in enumerate(sequences, 1):
            if len(sequence) < 2:
                raise InputError("A sequence of less than two tokens has no likelihood.", record=number)
            if wild_type is not None and len(sequence) != len(wild_type):
                raise InputError(
                    f"The sequence has {len(sequence)} tokens, and the wild type {len(wild_type)}.",
                    record=number,
                    hint="A masked model compares substitutions only.",
                )
        super().__init__(sequences, None if groups is None else _members(groups))
        self.values, self.gap, self.beta = measured, float(gap), float(beta)
        numbers = {group: number for number, group in enumerate(dict.fromkeys(groups or ()))}
        self.groups = np.zeros(len(sequences), np.int64) if groups is None else np.array([numbers[g] for g in groups])
        self.wild = None if wild_type is None else WildType(np.asarray(wild_type, np.int64), marginal)
        self.reference = None if reference is None else np.asarray(reference, np.float64)
        if self.reference is not None and self.reference.shape != measured.shape:
            raise InputError(f"There are {self.reference.shape} reference values for {len(sequences)} sequences.")
        if not any(len(self._pairs(np.flatnonzero(self.groups == g))) for g in range(max(len(numbers), 1))):
            raise InputError(f"There is nothing to compare: no two values differ by more than {gap}.")

    @classmethod
    def of_pairs(
        cls,
        preferred: Sequence[Tokens],
        rejected: Sequence[Tokens],
        *,
        beta: float | int = 0.1,
        wild_type: Tokens | None = None,
        marginal: str = "wild-type-marginal",
    ) -> Preferences:
        """Return pairs, each a group of its own.

        Raises:
            InputError: as ``Preferences``; or there are not as many of one as of the other.
        """
        if len(preferred) != len(rejected):
            raise InputError(f"There are {len(preferred)} preferred sequences and {len(rejected)} rejected ones.")
        sequences = [part for pair in zip(preferred, rejected, strict=True) for part in pair]
        values = np.tile([1.0, 0.0], len(preferred))
        return cls(
            sequences,
            values,
            beta=beta,
            groups=[row // 2 for row in range(len(sequences))],
            wild_type=wild_type,
            marginal=marginal,
        )

    @classmethod
    def encode(
        cls,
        tokenizer: Tokenizer,
        records: Sequence[Any],
        values: ArrayLike,
        *,
        gap: float | int = 0.0,
        beta: float | int = 0.1,
        groups: Sequence[Hashable] | None = None,
        wild_type: Any = None,
        marginal: str = "wild-type-marginal",
    ) -> Preferences:
        """Tokenize records, and the wild type.

        Raises:
            InputError: as ``Preferences``; or a record cannot be encoded, by its number.
        """
        sequences = encoded(tokenizer, records)
        wild = None if wild_type is None else tokenizer.encode(wild_type)
        return cls(sequences, values, gap=gap, beta=beta, groups=groups, wild_type=wild, marginal=marginal)

    def with_reference(self, model: LanguageModel, *, batch_tokens: int = 8192, progress: bool = False) -> Preferences:
        """Return the same with the log-likelihoods under ``model``, as it is before training.

        Raises:
            ConfigError: the model gives no likelihood; see ``check``.
        """
        _check_likelihood(model, self.wild)
        found = np.zeros(len(self.sequences))
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad(), tqdm(total=len(found), disable=not progress, desc="reference") as bar:
                for rows in pack([len(sequence) for sequence in self.sequences], batch_tokens):
                    batch = PackedBatch.from_sequences([self.sequences[row] for row in rows])
                    found[rows] = log_likelihoods(model, batch, self.wild).double().cpu().numpy()
                    bar.update(len(rows))
        finally:
            model.train(was_training)
        other = copy.copy(self)
        other.reference = found
        return other

    def check(self, model: Trainable) -> None:
        """Raise ConfigError where the model gives no likelihood, or that of the reference is not there."""
        _check_likelihood(language_model(model), self.wild)
        if self.reference is None:
            raise ConfigError("The reference is not there: data.with_reference(model) computes it before training.")

    def untaught(self, model: Trainable) -> list[nn.Module]:
        """The heads of labels and of contacts."""
        model = language_model(model)
        return [module for module in (model.task, model.contacts) if module is not None]

    def objective(self, batch: PackedBatch, rows: NDArray[np.int64], model: Trainable) -> PreferenceObjective:
        """Return the pairs in a batch."""
        assert self.reference is not None
        pairs = torch.from_numpy(self._pairs(rows))
        return PreferenceObjective(batch, pairs, torch.from_numpy(self.reference[rows]).float(), self.beta, self.wild)

    def digest(self) -> bytes:
        """A hash of values, groups and reference."""
        known = [] if self.reference is None else [self.reference]
        wild = "" if self.wild is None else f"{self.wild.marginal} {self.wild.tokens.tolist()}"
        return hashed(self.values, self.groups, *known, f"{self.gap} {self.beta} {wild}")

    def _pairs(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Places in ``rows`` of the preferred and the rejected one of each pair, [pairs, 2]."""
        values, groups = self.values[rows], self.groups[rows]
        better = values[:, None] > values[None] + self.gap  # False with NaN
        return np.argwhere(better & (groups[:, None] == groups[None])).astype(np.int64)


@dataclass(frozen=True)
class PreferenceObjective(TaughtObjective):
    """The pairs in one batch.

    Attributes:
        batch: what is compared.
        pairs: the sequences of each pair in the batch, preferred and rejected, int64 [pairs, 2].
        reference: log-likelihood of each sequence before training, nats, [sequences].
        beta: see ``Preferences``.
        wild: see ``Preferences``.
    """

    batch: PackedBatch
    pairs: Int[Tensor, "pairs two"]
    reference: Float[Tensor, " sequences"]
    beta: float
    wild: WildType | None

    @property
    def weight(self) -> float:
        """Number of pairs."""
        return float(len(self.pairs))

    def loss_sum(self, model: Trainable) -> Float[Tensor, ""]:
        """Return the sum of the losses of the pairs (nats)."""
        found = log_likelihoods(language_model(model), self.batch, self.wild)
        reference, (better, worse) = self.reference.to(found.device), self.pairs.to(found.device).T
        mean = preference_loss(found[better], found[worse], reference[better], reference[worse], beta=self.beta)
        return mean * len(self.pairs)


def log_likelihoods(
    model: LanguageModel, batch: PackedBatch, wild_type: WildType | None = None
) -> Float[Tensor, " sequences"]:
    """Return the log-likelihood (nats) of each sequence, or under a masked model its ratio to that of the wild type."""
    if model.causal:
        objective = causal(batch, model.vocabulary, torch.Generator())
        inputs = objective.batch.to(model.device)
        hidden, _ = model.backbone(inputs)
        there = Objective(inputs, objective.targets.to(model.device), objective.weights.to(model.device))
        return sequence_log_likelihoods(model.logits(hidden, inputs), there)
    assert wild_type is not None
    variants, wild = batch.tokens.view(len(batch), -1), torch.from_numpy(wild_type.tokens)
    owner, place = (variants != wild).nonzero(as_tuple=True)
    if wild_type.marginal == "masked-marginal":
        read = variants.masked_fill(variants != wild, model.vocabulary.require("mask"))
        contexts, context = torch.unique(read, dim=0, return_inverse=True)  # variants of one site are read once
    else:
        contexts, context = wild[None], torch.zeros(len(batch), dtype=torch.int64)
    inputs = PackedBatch.from_sequences(list(contexts), device=model.device)
    hidden, _ = model.backbone(model.whole(inputs))
    at = (context[owner] * len(wild) + place).to(model.device)
    log_p = F.log_softmax(model.logits(hidden, inputs, at).float(), -1)
    asked = torch.stack((variants[owner, place], wild[place]), 1).to(model.device)
    ratios = log_p.gather(1, asked) @ log_p.new_tensor([1.0, -1.0])
    return ratios.new_zeros(len(batch)).index_add(0, owner.to(model.device), ratios)


def _check_likelihood(model: LanguageModel, wild_type: WildType | None) -> None:
    if model.causal and wild_type is not None:
        raise ConfigError("A causal model has likelihoods by itself: leave wild_type out.")
    if not model.causal and wild_type is None:
        raise ConfigError("A masked model compares variants of one sequence: give Preferences its wild_type.")
    if not model.causal:
        model.vocabulary.require("mask")


def _members(groups: Sequence[Hashable]) -> list[NDArray[np.int64]]:
    rows: dict[Hashable, list[int]] = defaultdict(list)
    for row, group in enumerate(groups):
        rows[group].append(row)
    return [np.array(members) for members in rows.values()]
