"""Two views of one input should say the same: either strand of DNA, two SMILES of a molecule."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def symmetric_divergence(
    logits: Float[Tensor, "rows classes"], others: Float[Tensor, "rows classes"]
) -> Float[Tensor, " rows"]:
    """Return (KL(p, q) + KL(q, p)) / 2 = sum (p - q) (log p - log q) / 2 of each row, in nats.

    p and q are the softmax of the logits of either view, with the same classes at the same places; a gradient flows to
    both. A task is trained with its own loss plus this one's mean, times a factor of 0.1 to 1.
    """
    log_p, log_q = logits.float().log_softmax(-1), others.float().log_softmax(-1)
    return 0.5 * ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1)
