"""The learning rate, a pure function of how much of the run is done."""

from __future__ import annotations

import math
from collections.abc import Callable


def warmup_cosine(done: float | int, *, warmup: float | int, floor: float | int) -> float:
    """Return the factor on the highest learning rate when the share ``done`` of the run is done.

    It rises linearly from 0 to 1 over the first ``warmup`` of the run, then falls along half a cosine to ``floor``
    (Loshchilov and Hutter 2017, equation 5, one cycle) and stays there.
    """
    if done < warmup:
        return done / warmup
    if done >= 1:
        return float(floor)
    angle = math.pi * (done - warmup) / (1 - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(angle))


def warmup_linear(done: float | int, *, warmup: float | int, floor: float | int) -> float:
    """Return the factor on the highest learning rate when the share ``done`` of the run is done.

    It rises linearly from 0 to 1 over the first ``warmup`` of the run, then falls linearly to ``floor`` and stays.
    """
    if done < warmup:
        return done / warmup
    if done >= 1:
        return float(floor)
    return floor + (1 - floor) * (1 - done) / (1 - warmup)


SCHEDULES: dict[str, Callable[..., float]] = {"cosine": warmup_cosine, "linear": warmup_linear}
