"""Masked-token prediction that looks first at named spans (Linguistic Entity Masking, Fernando and Ranathunga 2025).

LEM masks one token of an entity, MLM-FG (Peng et al. 2024, functional groups of molecules) all of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from ...errors import ConfigError, InputError
from ...sequences import PackedBatch, Vocabulary
from .corruption import Ordinary, corrupted, uniform
from .objective import Objective

MODES = ("one", "span")
Entities = Sequence[Sequence[tuple[int, int]]]


def entity_masked(
    batch: PackedBatch,
    vocabulary: Vocabulary,
    generator: torch.Generator,
    entities: Entities,
    *,
    share: float = 0.15,
    entity_share: float | int = 0.5,
    mode: str = "one",
) -> Objective:
    """Choose ``share`` of the ordinary tokens, ``entity_share`` of these in entities, and predict them from the rest.

    Entities are drawn in random order. Mode "one" takes one token of each, "span" all of an entity's that are not yet
    taken, if the budget has room for them. What the entities leave of the budget is drawn among the tokens that lie in
    no drawn entity. Chosen tokens are masked, replaced or left as in ``masked``, those of one entity alike.

    Args:
        batch: the sequences.
        vocabulary: the tokens they are made of.
        generator: of every draw.
        entities: for each sequence its entities, each the first token and the one past its last, counted in the
            sequence from 0 with its begin token. They may overlap; special tokens in them are left out.
        share: of the ordinary tokens of the whole batch, rounded.
        entity_share: of that budget, rounded; what too few entities do not use goes to the other tokens.
        mode: "one" or "span".

    Raises:
        ConfigError: the vocabulary has no mask token or no ordinary token, or there is no such mode.
        InputError: entities are not of these sequences.
    """
    if mode not in MODES:
        raise ConfigError(f"Entities are masked {' or '.join(map(repr, MODES))}, not {mode!r}.")
    mask = vocabulary.require("mask")
    device = batch.tokens.device
    ordinary = Ordinary.of(vocabulary, device)
    allowed = ordinary.among(batch.tokens)
    budget = round(share * int(allowed.sum()))
    rng = np.random.default_rng(int(torch.randint(2**62, (), generator=generator, device=generator.device)))
    spans = packed_spans(batch, entities)
    group, drawn = _drawn(spans, allowed.cpu().numpy(), rng, budget=round(entity_share * budget), mode=mode)
    rest = np.flatnonzero(allowed.cpu().numpy() & ~drawn)
    more = rng.permutation(rest)[: max(budget - int((group >= 0).sum()), 0)]
    group[more] = len(spans) + np.arange(len(more))
    groups = torch.from_numpy(group).to(device)
    fate = uniform(len(spans) + len(group), generator, device)[groups.clamp(min=0)]
    chosen = groups >= 0
    return Objective(
        corrupted(batch, chosen, fate, ordinary=ordinary, mask=mask, generator=generator), batch.tokens, chosen.float()
    )


def packed_spans(batch: PackedBatch, entities: Entities) -> NDArray[np.int64]:
    """Return the spans of all sequences, counted in the packed batch, int64 [spans, 2].

    Raises:
        InputError: there are entities of another number of sequences, or one is empty or outside of its sequence.
    """
    if len(entities) != len(batch):
        raise InputError(f"There are spans of {len(entities)} sequences, and the batch holds {len(batch)}.")
    starts, lengths = batch.cu_seqlens.tolist(), batch.lengths.tolist()
    found = []
    for s, spans in enumerate(entities):
        for first, end in spans:
            if not 0 <= first < end <= lengths[s]:
                raise InputError(
                    f"Sequence {s} of the batch has {lengths[s]} tokens and no span from {first} to {end}."
                )
            found.append((starts[s] + first, starts[s] + end))
    return np.array(found, np.int64).reshape(-1, 2)


def _drawn(
    spans: NDArray[np.int64], allowed: NDArray[np.bool_], rng: np.random.Generator, *, budget: int, mode: str
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return for each token the number of the entity that chose it, or -1, and whether a drawn entity holds it."""
    group, drawn = np.full(len(allowed), -1), np.zeros(len(allowed), bool)
    for number in rng.permutation(len(spans)):
        if budget < 1:
            break
        first, end = spans[number]
        inside = first + np.flatnonzero(allowed[first:end])
        new = inside[group[inside] < 0]
        if mode == "one":
            new = rng.choice(new, 1) if len(new) == len(inside) > 0 else new[:0]
        if not 0 < len(new) <= budget:
            continue
        group[new] = number
        drawn[inside] = True
        budget -= len(new)
    return group, drawn
