"""The tokens of each sequence, in running direction."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor


def running_tokens(cu_seqlens: Tensor | None, tokens: int, reverse: bool = False) -> list[list[int]]:
    """Return, for each packed sequence, its token numbers from first to last, or last to first."""
    edges = [0, tokens] if cu_seqlens is None else cu_seqlens.tolist()
    sequences = [list(range(start, end)) for start, end in pairwise(edges)]
    return [steps[::-1] for steps in sequences] if reverse else sequences
