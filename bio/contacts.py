"""Contacts between residues, from the attention maps of a protein language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from ..backbones.transformer import Transformer
from ..errors import ConfigError
from ..sequences import Record
from .tasks import checked_texts

if TYPE_CHECKING:
    from ..models import LanguageModel


def contacts(
    records: Sequence[Record | str], model: LanguageModel, *, batch_tokens: int = 4096, progress: bool = False
) -> list[NDArray[np.float32]]:
    """Probability that two residues touch (C-beta atoms within 8 Angstrom), by the regression that came with a model.

    The attention maps of all heads, without the begin and end tokens, are made symmetric, corrected by the average
    product, and summed with the regression's weights (Rao et al. 2021, doi:10.1101/2020.12.15.422761). One block's maps
    are in memory at a time: heads x residues^2 x 4 bytes for each sequence of a batch.

    Args:
        records: what ``read`` gave, or plain strings.
        model: with the contact regression that ESM-2 has.
        batch_tokens: most tokens of one packed batch.
        progress: show a bar.

    Returns:
        float32 [residues, residues] for each record, without rows for a record with a problem.

    Raises:
        InputError: the tokenizer refuses a sequence, with its number, name and position.
        ConfigError: the model has no such regression.
    """
    from ..inference.batches import encode_all, evaluating, ordinary, packed

    head, backbone = model.contacts, model.backbone
    if head is None or not isinstance(backbone, Transformer):
        raise ConfigError("The model has no regression from attention maps to contacts; ESM-2 has one.")
    weights = head.weight.float().view(backbone.config.depth, backbone.config.heads)
    sequences = encode_all(model, checked_texts(records, model.tokenizer))
    found = [np.zeros((0, 0), np.float32) for _ in sequences]
    with evaluating(model):
        for group, (batch,) in packed(model, sequences, batch_tokens=batch_tokens, progress=progress, label="contacts"):
            kept = batch.split(ordinary(model, batch.tokens))
            sums = [torch.zeros(0, device=batch.tokens.device)] * len(kept)
            for number, (weight, maps) in enumerate(zip(weights, backbone.attention_maps(batch), strict=True)):
                parts = [summed(one[:, here][:, :, here], weight) for one, here in zip(maps, kept, strict=True)]
                sums = parts if number == 0 else [a + b for a, b in zip(sums, parts, strict=True)]
            for index, total in zip(group, sums, strict=True):
                found[index] = torch.sigmoid(total + head.bias.float()).cpu().numpy()
    return found


def summed(
    maps: Float[Tensor, "heads residues residues"], weight: Float[Tensor, " heads"]
) -> Float[Tensor, "residues residues"]:
    """Return the weighted sum of attention maps, made symmetric and freed of what rows and columns have in common."""
    maps = maps + maps.mT
    rows = maps.sum(2, keepdim=True)
    expected = rows * rows.mT / rows.sum(1, keepdim=True)
    return torch.einsum("hij,h->ij", maps - expected, weight.to(maps.dtype))
