"""Direct preference optimisation (DPO, Rafailov et al. 2023, arXiv:2305.18290, equation 7).

    L = -log sigmoid(beta ((log pi(w) - log ref(w)) - (log pi(l) - log ref(l))))

w is preferred to l. The likelihoods under the reference, the model before training, do not change: they are computed
once (``sequence_log_likelihoods`` without gradients, or ``inference.log_likelihood``) and kept beside the sequences.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from ...errors import ConfigError, ShapeError
from .objective import Objective


def preference_loss(
    preferred: Float[Tensor, " pairs"],
    rejected: Float[Tensor, " others"],
    preferred_reference: Float[Tensor, " preferred"],
    rejected_reference: Float[Tensor, " rejected"],
    *,
    beta: float = 0.1,
) -> Float[Tensor, ""]:
    """Mean loss of pairs, from the log-likelihoods (nats, [pairs]) of either sequence under model and reference.

    Raises:
        ShapeError, ConfigError: the pairs disagree in number, or ``beta`` is not positive.
    """
    if beta <= 0:
        raise ConfigError(f"beta is {beta}; it must be positive.")
    shapes = {tuple(part.shape) for part in (preferred, rejected, preferred_reference, rejected_reference)}
    if len(shapes) > 1:
        raise ShapeError("log-likelihoods", tuple(sorted(shapes)), "[pairs], four times")
    margin = (preferred - preferred_reference) - (rejected - rejected_reference)
    return F.softplus(-beta * margin).sum() / max(len(margin), 1)


def sequence_log_likelihoods(
    logits: Float[Tensor, "tokens vocabulary"], objective: Objective
) -> Float[Tensor, " sequences"]:
    """Sum the weighted log-probabilities (nats) of the targets of each sequence of ``objective``.

    ``causal`` leaves out sequences of less than two tokens: they have no likelihood here.
    """
    losses = F.cross_entropy(logits.float(), objective.targets.to(logits.device), reduction="none")
    weighted = -losses * objective.weights.to(logits.device)
    owner = objective.batch.sequence_ids.to(logits.device)
    return torch.zeros(len(objective.batch), device=logits.device).index_add(0, owner, weighted)


def preference_pairs(
    values: NDArray[np.floating],
    *,
    gap: float,
    most: int = 32,
    rng: np.random.Generator,
) -> NDArray[np.int64]:
    """Return pairs of a preferred and a rejected sequence, int64 [pairs, 2], in order of the preferred one.

    Args:
        values: what was measured of each sequence, more being better; NaN is in no pair.
        gap: least difference of a pair: twice the standard deviation of replicates is above the noise.
        most: pairs in which a sequence is the preferred one, drawn among all that it could have.
        rng: of the draw.
    """
    pairs = []
    for number in np.flatnonzero(~np.isnan(values)):
        worse = np.flatnonzero(values < values[number] - gap)
        chosen = np.sort(rng.permutation(worse)[:most])
        pairs.append(np.stack((np.full(len(chosen), number), chosen), 1))
    return np.concatenate(pairs).astype(np.int64) if pairs else np.zeros((0, 2), np.int64)
