"""Next-token prediction."""

from __future__ import annotations

import numpy as np
import torch

from ...sequences import PackedBatch, Vocabulary
from .objective import Objective

SILENT_ROLES = ("pad", "mask", "unk")  # they stand for nothing that a model should learn to write


def causal(batch: PackedBatch, vocabulary: Vocabulary, generator: torch.Generator) -> Objective:
    """Predict every token from the ones before it in its own sequence.

    The model reads each sequence without its last token; the target at a position is the token after it, the end
    token included. No target crosses a sequence boundary, and a sequence of one token has none and is left out.
    Padding, mask and unknown tokens are read but never a target. ``generator`` is not used: there is no chance in it.
    """
    device = batch.tokens.device
    tokens, bounds, positions = (part.cpu().numpy() for part in (batch.tokens, batch.cu_seqlens, batch.positions))
    lengths = np.diff(bounds)
    reads = np.ones(len(tokens), bool)
    reads[bounds[1:][lengths > 0] - 1] = False  # the last token of each
    where = np.flatnonzero(reads)
    targets, kept = tokens[where + 1], lengths > 1
    cu_seqlens = np.zeros(kept.sum() + 1, np.int64)
    np.cumsum(lengths[kept] - 1, out=cu_seqlens[1:])
    conditions = {name: value[torch.from_numpy(kept).to(value.device)] for name, value in batch.conditions.items()}
    silent = [i for i in map(vocabulary.role, SILENT_ROLES) if i is not None]
    counts = np.ones(len(targets), np.float32)
    for role in silent:
        counts[targets == role] = 0
    parts = tokens[where], cu_seqlens, positions[where], targets, counts
    read, edges, places, asked, weights = (torch.from_numpy(part).to(device) for part in parts)
    return Objective(PackedBatch(read, edges, places, conditions), asked, weights)
