"""The steps of a run: which sequences each one reads, what they teach, and how much of the run is done then."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ..sequences import PackedBatch
from .batches import Order
from .checkpoint import Standing
from .config import TrainingConfig
from .data import Pieces
from .engines import Engine
from .lanes import Lanes, Spans
from .step import MASKS, make_objective
from .taught import AnyObjective

AHEAD = 4096  # tokens of steps that are made ready together: the second one costs half, with all of it in the cache


class Step(NamedTuple):
    """One step of the plan: its epoch, its place there, the steps of that epoch, the sequences of its batches.

    In the place of lanes that have nothing left to read stands None, so that a batch keeps its number.
    """

    epoch: int
    position: int
    of: int
    batches: Sequence[Order | Spans | None]


def plan(pieces: Pieces, config: TrainingConfig, standing: Standing) -> Iterator[Step]:
    """Yield the steps that come after ``standing``, without end."""
    position, each = standing.position, config.accumulation
    for epoch in itertools.count(standing.epoch):
        if config.long == "carry":
            assert config.max_length is not None
            lanes = Lanes(
                pieces.lengths,
                pieces.order(seed=config.seed, epoch=epoch),
                tokens=config.max_length,
                lanes=config.batch_tokens // config.max_length,
                batches=each,
            )
            for number in range(position, len(lanes)):
                yield Step(epoch, number, len(lanes), lanes[number])
        else:
            batches = pieces.batches(batch_tokens=config.batch_tokens, seed=config.seed, epoch=epoch)
            of = -(-len(batches) // each)
            for number in range(position, of):
                yield Step(epoch, number, of, batches[number * each : (number + 1) * each])
        position = 0


class Ready(NamedTuple):
    """A step, the tokens of all its batches, and what those of this process teach: number, objective, if it counts."""

    step: Step
    tokens: int
    objectives: list[tuple[int, AnyObjective, bool]]


def ready_steps(pieces: Pieces, config: TrainingConfig, standing: Standing, engine: Engine) -> Iterator[Ready]:
    """Yield the steps of ``plan`` with what they teach, which depends on the seed and the step's number alone."""
    waiting: list[Ready] = []
    model = engine.model
    for number, step in enumerate(plan(pieces, config, standing), standing.step):
        objectives = []
        shared: list[tuple[int, Order | Spans, bool]] = engine.share(step.batches)
        for n, chosen, counted in shared:
            batch = read_batch(pieces, chosen, vocabulary_size=model.vocabulary_size)
            objectives.append((n, make_objective(batch, model, config, MASKS, number, n), counted))
        tokens = sum(count_tokens(pieces, chosen) for chosen in step.batches if chosen is not None)
        waiting.append(Ready(step, tokens, objectives))
        # The run may end with the epoch, and planning another one takes time.
        if sum(ready.tokens for ready in waiting) >= AHEAD or step.position + 1 == step.of:
            yield from waiting
            waiting = []


def read_batch(pieces: Pieces, chosen: Order | Spans, *, vocabulary_size: int) -> PackedBatch:
    """Read the pieces, or the spans of lanes, of one batch.

    Raises:
        InputError: a token id is not in the vocabulary.
    """
    if isinstance(chosen, Spans):
        return chosen.batch(pieces, vocabulary_size=vocabulary_size)
    return pieces.batch(chosen, vocabulary_size=vocabulary_size)


def count_tokens(pieces: Pieces, chosen: Order | Spans) -> int:
    """Tokens of one batch, those that stand in two of them because a sequence is cut there once."""
    return chosen.tokens if isinstance(chosen, Spans) else int(pieces.lengths[chosen].sum(dtype=np.int64))


def share_done(config: TrainingConfig, standing: Standing, step: Step) -> float:
    """Share of the run that is done when ``step`` is taken (with ``minutes``: that is done now)."""
    if config.steps is not None:
        return (standing.step + 1) / config.steps
    if config.epochs is not None:
        return (step.epoch + (step.position + 1) / step.of) / config.epochs
    assert config.minutes is not None
    return standing.seconds / (60 * config.minutes)
