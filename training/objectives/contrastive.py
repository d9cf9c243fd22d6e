"""Two towers: embeddings of pairs are drawn together, those of others apart, and a head tells pairs from near misses.

InfoNCE is van den Oord et al. 2018 (arXiv:1807.03748), both ways as CLIP has it (Radford et al. 2021); the hard
negatives of the matching loss are drawn as in ALBEF (Li et al. 2021, arXiv:2107.07651, section 3.2). LangCell trains
cells and texts with both.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ...errors import ConfigError, ShapeError


def contrastive_loss(
    one: Float[Tensor, "pairs width"],
    other: Float[Tensor, "partners other_width"],
    *,
    temperature: float | Float[Tensor, ""] = 0.05,
    groups: Int[Tensor, " grouped"] | None = None,
) -> Float[Tensor, ""]:
    """Mean cross-entropy (nats) of finding the partner among all pairs, from either side.

        L = (CE(s, p) + CE(s^T, p)) / 2,      s_ij = cos(one_i, other_j) / temperature

    Args:
        one: embeddings of one tower, of any norm.
        other: those of their partners, [pairs, width].
        temperature: of the softmax.
        groups: a number for each pair, [pairs]; those with one number (cells with one text) are all partners, with
            equal shares in p. None: each has its own partner alone.

    Raises:
        ShapeError, ConfigError: the arguments disagree, or the temperature is not positive.
    """
    similarity = _similarity(one, other, temperature)
    same = _same(groups, len(one), one.device).to(similarity.dtype)
    shares = same / same.sum(1, keepdim=True)
    return 0.5 * (F.cross_entropy(similarity, shares) + F.cross_entropy(similarity.T, shares))


def hard_negatives(
    one: Float[Tensor, "pairs width"],
    other: Float[Tensor, "partners other_width"],
    generator: torch.Generator,
    *,
    temperature: float = 0.05,
    groups: Int[Tensor, " grouped"] | None = None,
) -> tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"]]:
    """Draw for each of either side a wrong partner, the likelier the more similar it is.

    Returns:
        For each of ``one`` the number of a pair whose ``other`` is not its partner, and for each of ``other`` that of a
        pair whose ``one`` is not; -1 where all are partners.

    Raises:
        ShapeError, ConfigError: as ``contrastive_loss``.
    """
    similarity = _similarity(one.detach(), other.detach(), temperature).to(generator.device)
    same = _same(groups, len(one), similarity.device)
    drawn = []
    for rows in (similarity, similarity.T):
        lonely = same.all(1)
        chances = rows.masked_fill(same & ~lonely[:, None], float("-inf")).softmax(1)
        partner = torch.multinomial(chances, 1, generator=generator)[:, 0]
        drawn.append(partner.masked_fill(lonely, -1).to(one.device))
    return drawn[0], drawn[1]


def matching_loss(matched: Float[Tensor, " pairs"], unmatched: Float[Tensor, " others"]) -> Float[Tensor, ""]:
    """Mean binary cross-entropy (nats) of the logits that a head gives to partners and to ``hard_negatives``."""
    losses = torch.cat((F.softplus(-matched.float()), F.softplus(unmatched.float())))
    return losses.sum() / max(len(losses), 1)


def _similarity(one: Tensor, other: Tensor, temperature: float | Tensor) -> Float[Tensor, "pairs pairs"]:
    if one.shape != other.shape:
        raise ShapeError("other", tuple(other.shape), tuple(one.shape))
    if not temperature > 0:
        raise ConfigError(f"The temperature is {float(temperature)}; it must be positive.")
    return F.normalize(one.float(), dim=-1) @ F.normalize(other.float(), dim=-1).T / temperature


def _same(groups: Tensor | None, pairs: int, device: torch.device) -> Bool[Tensor, "pairs pairs"]:
    if groups is None:
        return torch.eye(pairs, dtype=torch.bool, device=device)
    if groups.shape != (pairs,):
        raise ShapeError("groups", tuple(groups.shape), (pairs,))
    return (groups[:, None] == groups[None]).to(device)
