"""Next-token prediction that counts answers alone, as instruction tuning has it: a prompt is read and not learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ...sequences import PackedBatch, Vocabulary
from .causal import causal
from .entity_masked import packed_spans
from .objective import Objective


def answer(
    batch: PackedBatch,
    vocabulary: Vocabulary,
    generator: torch.Generator,
    answers: Sequence[Sequence[tuple[int, int]]],
) -> Objective:
    """Predict every token from the ones before it, as ``causal``, and count those that lie in an answer.

    Args:
        batch: the sequences.
        vocabulary: the tokens they are made of.
        generator: not used.
        answers: for each sequence its answers, each the first token and the one past its last, counted in the sequence
            from 0. Several are those of a conversation; a sequence with none counts nothing.

    Raises:
        InputError: the answers are not of these sequences.
    """
    whole = causal(batch, vocabulary, generator)
    inside = torch.zeros(len(batch.tokens), dtype=torch.bool, device=batch.tokens.device)
    for first, end in packed_spans(batch, answers):
        inside[first:end] = True
    target = torch.ones_like(inside)  # causal asks for every token but the first of a sequence
    target[batch.cu_seqlens[:-1][batch.lengths > 0]] = False
    return replace(whole, weights=whole.weights * inside[target])
