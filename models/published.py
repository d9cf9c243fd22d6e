"""Names that fair-esm gives to ESM-2, what stands behind them, and where its downloads lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..errors import InputError

FAIR_ESM = {  # name -> depth, width, heads (Lin et al. 2023)
    "esm2_t6_8M_UR50D": (6, 320, 20),
    "esm2_t12_35M_UR50D": (12, 480, 20),
    "esm2_t30_150M_UR50D": (30, 640, 20),
    "esm2_t33_650M_UR50D": (33, 1280, 20),
    "esm2_t36_3B_UR50D": (36, 2560, 40),
    "esm2_t48_15B_UR50D": (48, 5120, 40),
}


def published_parts(name: str) -> dict[str, Any]:
    """Return our configuration of a name.

    Raises:
        InputError: there is no such name.
    """
    if name not in FAIR_ESM:
        raise InputError(f"No model of fair-esm's is called {name!r}.", hint=f"There are {', '.join(FAIR_ESM)}.")
    depth, width, heads = FAIR_ESM[name]
    backbone = {
        "family": "transformer",
        "vocabulary_size": 33,
        "width": width,
        "depth": depth,
        "heads": heads,
        "direction": "bidirectional",
        "norm": "layer",
        "activation": "gelu",
        "bias": True,
        "token_dropout": 32,
    }
    return {"tokenizer": {"name": "protein"}, "backbone": backbone, "head": {"kind": "esm", "contacts": True}}


def downloaded(name: str) -> Path | None:
    """Return the file that fair-esm has downloaded for a name; None if there is none."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / f"{name}.pt"
    return path if path.is_file() else None
