"""What a chosen token becomes: shared by the objectives that put something else in its place."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ...errors import ConfigError
from ...sequences import PackedBatch, Vocabulary

MASKED, REPLACED = 0.8, 0.1  # of the chosen tokens; the remaining tenth is left as it is


@dataclass(frozen=True)
class Ordinary:
    """The tokens of a vocabulary that stand for a part of the input.

    Attributes:
        ids: their ids in order, int64 [ordinary].
        special: ids of all others, int64 [special].
    """

    ids: Int[Tensor, " ordinary"]
    special: Int[Tensor, " special"]

    @classmethod
    def of(cls, vocabulary: Vocabulary, device: torch.device, *, least: int = 1) -> Ordinary:
        """Return those of ``vocabulary``.

        Raises:
            ConfigError: there are fewer than ``least``.
        """
        ids = vocabulary.ordinary_ids
        if len(ids) < least:
            found = f"{len(ids)} such" if len(ids) else "none"
            raise ConfigError(f"This training needs {least} or more tokens that are not special; there are {found}.")
        special = torch.tensor(sorted(vocabulary.special_ids), dtype=torch.int64, device=device)
        return cls(torch.from_numpy(ids).to(device), special)

    def among(self, tokens: Int[Tensor, " tokens"]) -> Bool[Tensor, " tokens"]:
        """Tell which tokens are ordinary."""
        return ~torch.isin(tokens, self.special)

    def other_than(self, tokens: Int[Tensor, " tokens"], generator: torch.Generator) -> Int[Tensor, " tokens"]:
        """Draw for each token uniformly from the ordinary ones without itself; a special token may become any."""
        own = torch.searchsorted(self.ids, tokens.contiguous()).clamp(max=len(self.ids) - 1)
        draw = torch.randint(len(self.ids) - 1, tokens.shape, generator=generator, device=generator.device)
        draw = draw.to(tokens.device)
        return self.ids[draw + (draw >= own)]


def corrupted(
    batch: PackedBatch,
    chosen: Bool[Tensor, " tokens"],
    fate: Float[Tensor, " tokens"],
    *,
    ordinary: Ordinary,
    mask: int,
    generator: torch.Generator,
) -> PackedBatch:
    """Return the batch with 80% of the chosen tokens masked, 10% random ordinary tokens and 10% as they were.

    ``fate``, uniform between 0 and 1, decides; tokens with equal fate are treated alike.
    """
    device = batch.tokens.device
    others = torch.randint(len(ordinary.ids), (len(batch.tokens),), generator=generator, device=generator.device)
    tokens = torch.where(chosen & (fate < MASKED), mask, batch.tokens)
    replaced = chosen & (fate >= MASKED) & (fate < MASKED + REPLACED)
    return with_tokens(batch, torch.where(replaced, ordinary.ids[others.to(device)], tokens))


def with_tokens(batch: PackedBatch, tokens: Int[Tensor, " tokens"]) -> PackedBatch:
    """Return the batch with other tokens at the same places."""
    return PackedBatch(tokens, batch.cu_seqlens, batch.positions, batch.conditions)


def uniform(count: int, generator: torch.Generator, device: torch.device) -> Float[Tensor, " count"]:
    """Draw ``count`` numbers between 0 and 1 on the generator's device, for ``device``."""
    return torch.rand(count, generator=generator, device=generator.device).to(device)
