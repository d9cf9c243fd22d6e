"""Several frames of one sequence: k-mers that begin at its first base, at its second, and so on.

GENERator begins each sequence of each epoch at a random one of six bases (Wu et al. 2025, arXiv:2502.07272), so that a
model does not learn one frame. All frames at once, in one pass, are the same without chance.
"""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, InputError
from ..sequences import Record, Tokenizer
from .tokenizer import KmerTokenizer

UNKNOWN = re.compile("[^ACGTUacgtu]+")


def in_frames(text: str, tokenizer: Tokenizer, frames: int) -> list[str]:
    """Return ``text`` from each of its first ``frames`` bases on, as the tokenizer can read it.

    One that refuses N gets the stretches between unknown bases, and one that refuses a tail whole k-mers: with k frames
    every base of a stretch of k or more is in one of them.

    Raises:
        ConfigError: the tokenizer is none of k-mers, or there are more frames than it has.
    """
    if not isinstance(tokenizer, KmerTokenizer) or not 1 <= frames <= tokenizer.k:
        most = f"1 to {tokenizer.k}" if isinstance(tokenizer, KmerTokenizer) else "for k-mers alone"
        raise ConfigError(f"frames are {most}; the tokenizer is {tokenizer.name!r}, and frames is {frames}.")
    stretches = UNKNOWN.split(text) if tokenizer.n == "refuse" else [text]
    found = []
    for frame in range(frames):
        for stretch in stretches:
            rest = stretch[frame:]
            found.append(rest[: len(rest) // tokenizer.k * tokenizer.k] if tokenizer.tail == "refuse" else rest)
    return [part for part in found if part]


def encode_frames(record: Record, tokenizer: Tokenizer, frames: int) -> list[NDArray[np.int32]]:
    """Token ids of a record in each frame.

    Raises:
        InputError: the tokenizer refuses it, or it is too short for a k-mer.
    """
    try:
        found = [tokenizer.encode(part) for part in in_frames(record.text, tokenizer, frames)]
        if not found:
            raise InputError("The sequence is too short for a k-mer of known bases.", hint="Leave the record out.")
    except InputError as error:
        raise error.at(record=record.number, name=record.name or None) from None
    return found


def check_frames_alone(spans: object) -> None:
    """Raise ConfigError where spans are given beside frames."""
    if spans is not None:
        raise ConfigError("Spans are of sequences in one frame: train with data.frames none, or without spans.")
