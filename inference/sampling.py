"""Choosing the next token: filters on a distribution, and random numbers that belong to a sequence, not to a batch."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from ..errors import ConfigError

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def check_sampling(
    temperature: float | int, top_k: int | None, top_p: float | int | None, min_p: float | int | None
) -> None:
    """Raise ``ConfigError`` for an option that cannot work."""
    if temperature < 0:
        raise ConfigError(f"temperature is 0 (always the likeliest token) or positive, not {temperature}.")
    if top_k is not None and top_k < 1:
        raise ConfigError(f"top_k must be at least 1, not {top_k}.")
    for name, value in (("top_p", top_p), ("min_p", min_p)):
        if value is not None and not 0 < value <= 1:
            raise ConfigError(f"{name} lies above 0 and at most at 1, not {value}.")


def filtered(
    logits: Float[Tensor, "sequences vocabulary"],
    *,
    temperature: float | int = 1.0,
    top_k: int | None = None,
    top_p: float | int | None = None,
    min_p: float | int | None = None,
) -> Float[Tensor, "sequences vocabulary"]:
    """Return probabilities (float64) after the filters, in this order, each on what the one before it has left.

    ``temperature`` divides the logits (0 leaves the likeliest token alone); ``top_k`` keeps the k likeliest; ``top_p``
    (nucleus, Holtzman et al. 2020) keeps the fewest likeliest tokens whose probabilities sum to at least p; ``min_p``
    (Nguyen et al. 2024) keeps tokens at least ``min_p`` times as likely as the likeliest. The likeliest always stays.
    Of tokens equally likely the one with the lower id comes first.
    """
    if temperature and top_k is None and top_p is None and min_p is None:
        return torch.softmax(logits.double() / temperature, dim=-1)
    ordered, order = logits.double().sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[-1], device=logits.device)
    if temperature == 0:
        probabilities = (rank == 0).double().expand_as(ordered)
    else:
        if top_k is not None:
            ordered = ordered.masked_fill(rank >= top_k, -torch.inf)
        probabilities = torch.softmax(ordered / temperature, dim=-1)
        if top_p is not None:
            before = probabilities.cumsum(-1) - probabilities
            probabilities = _normalised(probabilities.masked_fill((before >= top_p) & (rank > 0), 0.0))
        if min_p is not None:
            probabilities = _normalised(probabilities.masked_fill(probabilities < min_p * probabilities[:, :1], 0.0))
    return torch.zeros_like(probabilities).scatter(-1, order, probabilities)


def draw(
    probabilities: Float[Tensor, "sequences vocabulary"], uniforms: Float[Tensor, " sequences"]
) -> Int[Tensor, " sequences"]:
    """Return for each row the token at which its cumulative probability passes ``uniforms`` (inverse CDF)."""
    cumulative = probabilities.cumsum(-1)
    found = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)[:, 0]
    tokens = torch.arange(probabilities.shape[-1], device=probabilities.device)
    last = (tokens * (probabilities > 0)).amax(-1)  # rounding never picks a token of probability 0 behind the last
    return torch.minimum(found, last)


def uniforms(seed: int, sequences: NDArray[np.int64], step: int) -> NDArray[np.float64]:
    """Return the number in [0, 1) that each sequence draws at ``step``.

    Every sequence has its own SplitMix64 stream (Steele et al. 2014), so a draw is a function of the seed, the number
    of the sequence and the step, whatever else is in the batch.
    """
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is meant
        start = np.uint64(seed % 2**64) + GOLDEN
        streams = _mix(_mix(np.atleast_1d(start)) + (sequences.astype(np.uint64) + np.uint64(1)) * GOLDEN)
        words = _mix(streams + np.uint64(step + 1) * GOLDEN)
    result: NDArray[np.float64] = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return result


def _mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = words ^ (words >> np.uint64(31))
    return mixed


def _normalised(probabilities: Tensor) -> Tensor:
    return probabilities / probabilities.sum(-1, keepdim=True)
