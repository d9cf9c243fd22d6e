"""Blank infilling mixed with masked tokens (GLM, Du et al. 2022, arXiv:2103.10360; xTrimoPGLM, Chen et al. 2025).

How blanks are laid out: ``sequences.blanked``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from ...sequences import Blanked, PackedBatch, Vocabulary, blanked, require_blanks, without_blanks
from ...sequences.blanks import NOTHING
from .corruption import Ordinary
from .masked import masked
from .objective import Objective

MEAN_BLANK = 3  # tokens of a short blank, Poisson (Du et al. 2022, section 2.2)
SHORTEST_SUFFIX = 0.5  # of a sequence (Du et al. 2022, section 2.3)


def glm(
    batch: PackedBatch,
    vocabulary: Vocabulary,
    generator: torch.Generator,
    *,
    share: float = 0.15,
    masked_share: float = 0.2,
    suffix_share: float = 0.5,
) -> Objective:
    """Give each sequence one of three tasks, so that one model understands and generates.

    - With probability ``masked_share``: masked tokens (``masked``), all of the sequence being its prefix.
    - Of the others, with probability ``suffix_share``: its end is one blank, ``<gmask>``, of uniformly half to all
      of the ordinary tokens.
    - Else: short blanks, ``<smask>``, with Poisson(3) tokens, at least 1, that hold ``share`` of the ordinary tokens
      (rounded, at least 1). They keep a token between them and are written in random order.

    xTrimoPGLM's mix is 20% masked tokens; how it divides the rest between the two kinds of blanks was not seen. Special
    tokens are never blanked and stay in the prefix. The lengths of the prefixes are the condition "prefix", which a
    transformer of ``direction = "prefix"`` needs.

    Raises:
        ConfigError: the vocabulary has no mask token or no ordinary one, or lacks ``<smask>``, ``<gmask>``, ``<sop>``
            or ``<eop>``.
    """
    require_blanks(vocabulary, "Blank infilling")
    device = batch.tokens.device
    whole = masked(batch, vocabulary, generator, share=share)
    allowed = Ordinary.of(vocabulary, device).among(batch.tokens)
    rng = np.random.default_rng(int(torch.randint(2**62, (), generator=generator, device=generator.device)))
    made = []
    columns = (batch.tokens, allowed, whole.batch.tokens, torch.where(whole.weights > 0, batch.tokens, NOTHING))
    for parts in zip(*(batch.split(column.cpu()) for column in columns), strict=True):
        tokens, free, corrupt, targets = (part.numpy() for part in parts)
        at = np.flatnonzero(free)
        if rng.random() < masked_share or not len(at):
            made.append(without_blanks(corrupt, targets))
        elif rng.random() < suffix_share:
            length = int(rng.integers(int(np.ceil(SHORTEST_SUFFIX * len(at))), len(at) + 1))
            made.append(blanked(tokens, [suffix(free, length)], "<gmask>", vocabulary))
        else:
            spans = short_blanks(free, max(round(share * len(at)), 1), rng)
            made.append(blanked(tokens, spans, "<smask>", vocabulary, order=rng.permutation(len(spans)).tolist()))
    return _packed(made, batch)


def suffix(free: NDArray[np.bool_], length: int) -> tuple[int, int]:
    """Return the last ``length`` free tokens as a span; it ends at a token between them that is not free."""
    first = int(np.flatnonzero(free)[-length])
    taken = np.flatnonzero(~free[first:])
    return first, first + int(taken[0]) if len(taken) else len(free)


def short_blanks(free: NDArray[np.bool_], budget: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Return spans of free tokens, in order and apart by a token or more, that hold ``budget`` tokens if they can."""
    room = np.append(free, False)  # nothing begins behind the last token
    spans = []
    for first in rng.permutation(np.flatnonzero(free)).tolist():
        if not budget:
            break
        stop = first + min(max(int(rng.poisson(MEAN_BLANK)), 1), budget)
        if not room[first:stop].all():
            continue
        spans.append((first, stop))
        budget -= stop - first
        room[max(first - 1, 0) : stop + 1] = False
    return sorted(spans)


def _packed(made: Sequence[Blanked], batch: PackedBatch) -> Objective:
    """Lay the sequences end to end again."""
    device = batch.tokens.device
    empty = np.zeros(0, np.int64)
    tokens, places, blocks, targets = (
        torch.from_numpy(np.concatenate([empty, *(one[column] for one in made)])).to(device) for column in range(4)
    )
    lengths = torch.tensor([len(one.tokens) for one in made], dtype=torch.int64, device=device)
    prefix = torch.tensor([one.prefix for one in made], dtype=torch.int64, device=device)
    laid = PackedBatch.from_lengths(tokens, lengths)
    conditions = {**batch.conditions, "prefix": prefix}
    inputs = PackedBatch(tokens, laid.cu_seqlens, places, conditions, block_positions=blocks)
    return Objective(inputs, targets.clamp(min=0), (targets != NOTHING).float())
