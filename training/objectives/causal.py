"""Next-token prediction."""

from __future__ import annotations

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
    last = batch.cu_seqlens[1:] - 1
    filled = batch.lengths > 0
    reads = torch.ones(len(batch.tokens), dtype=torch.bool, device=batch.tokens.device)
    reads[last[filled]] = False
    where = reads.nonzero()[:, 0]
    targets = batch.tokens[where + 1]
    lengths = batch.lengths - 1
    kept = lengths > 0
    cu_seqlens = torch.zeros(int(kept.sum()) + 1, dtype=torch.int64, device=batch.tokens.device)
    torch.cumsum(lengths[kept], 0, out=cu_seqlens[1:])
    conditions = {name: value[kept] for name, value in batch.conditions.items()}
    inputs = PackedBatch(batch.tokens[where], cu_seqlens, batch.positions[where], conditions)
    silent = [i for i in map(vocabulary.role, SILENT_ROLES) if i is not None]
    counts = ~torch.isin(targets, torch.tensor(silent, dtype=torch.int64, device=targets.device))
    return Objective(inputs, targets, counts.float())
