"""What the formats of ESM and its relatives share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...errors import InputError
from ...kernels.rotary import PRECISIONS, rotary_frequencies
from .table import Checkpoint, Parts, transformer_of

PROTEIN = {"name": "protein"}
ENCODER = {"family": "transformer", "direction": "bidirectional", "norm": "layer", "activation": "gelu", "bias": True}
QKV, UP = "backbone.blocks.{i}.query_key_value.*", "backbone.blocks.{i}.feed_forward.up.*"


def precision_in(checkpoint: Checkpoint, name: str, head_dim: int, base: float) -> str:
    """Return the precision of the rotary frequencies that a checkpoint holds: ESM-2 was trained with rounded ones.

    Raises:
        InputError: they are no powers of ``base`` in any precision.
    """
    if name not in checkpoint.shapes:
        return "float32"
    stored = checkpoint.read(name).double()
    for precision in PRECISIONS:
        expected = torch.from_numpy(rotary_frequencies(head_dim, base, precision))
        if stored.shape == expected.shape and torch.allclose(stored, expected, rtol=1e-6, atol=0):
            return precision
    raise InputError(f"The rotary frequencies in {name} do not follow from the base {base:g} and {head_dim} channels.")


def frequencies_out(parts: Parts) -> Tensor:
    """Return the rotary frequencies of a model, float32."""
    c = transformer_of(parts)
    return torch.from_numpy(rotary_frequencies(c.head_dim, float(c.rotary_base), c.rotary_precision)).float()


def head_in(contacts: bool, **options: float | bool) -> dict[str, Any]:
    """Return the head that they all have."""
    return {"kind": "esm", "contacts": contacts, **options}
