"""Models by the names that fair-esm gives them: from where its own loader has them, into the cache that it uses."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch

from ..errors import InputError
from .weights import CONTACTS

SOURCE = "https://dl.fbaipublicfiles.com/fair-esm"
FAIR_ESM = {  # name -> depth, width, heads (Rives et al. 2021, Meier et al. 2021, Lin et al. 2023)
    "esm2_t6_8M_UR50D": (6, 320, 20),
    "esm2_t12_35M_UR50D": (12, 480, 20),
    "esm2_t30_150M_UR50D": (30, 640, 20),
    "esm2_t33_650M_UR50D": (33, 1280, 20),
    "esm2_t36_3B_UR50D": (36, 2560, 40),
    "esm2_t48_15B_UR50D": (48, 5120, 40),
    "esm1b_t33_650M_UR50S": (33, 1280, 20),
    **{f"esm1v_t33_650M_UR90S_{member}": (33, 1280, 20) for member in range(1, 6)},
}
LICENCES = dict.fromkeys(FAIR_ESM, "MIT")


def fetch(name: str) -> Path:
    """Return the file of weights of a published model; it and its contact regression are downloaded at most once.

    They lie in PyTorch's cache, ``$TORCH_HOME/hub/checkpoints``, where fair-esm finds them too. fair-esm's own loader
    would unpickle them.

    Raises:
        InputError: they are not in the cache and cannot be downloaded.
    """
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    files = {f"{name}.pt": f"{SOURCE}/models/{name}.pt"}
    if has_contacts(name):
        files[f"{name}{CONTACTS}"] = f"{SOURCE}/regression/{name}{CONTACTS}"
    for file, url in files.items():
        if (folder / file).is_file():
            continue
        try:
            folder.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(folder / file), progress=False)
        except (URLError, OSError) as error:
            reason = getattr(error, "reason", None) or error
            raise InputError(
                f"{name} is not in the cache, and {url} cannot be downloaded ({reason}).",
                path=folder / file,
                hint="Put the file there.",
            ) from None
    return folder / f"{name}.pt"


def has_contacts(name: str) -> bool:
    """Whether a published model comes with a contact regression: all but ESM-1v do."""
    return not name.startswith("esm1v")


def downloaded(name: str) -> Path | None:
    """Return the file of weights of a published model if it is in the cache."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / f"{name}.pt"
    return path if path.is_file() else None


def published_parts(name: str) -> dict[str, Any]:
    """Return our configuration of a published model, without its weights."""
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
    if name.startswith("esm1"):
        backbone |= {"positions": "absolute", "max_positions": 1026, "position_offset": 2}
        backbone["embedding_norm"] = name.startswith("esm1b")
    head = {"kind": "esm", "contacts": has_contacts(name)}
    return {"tokenizer": {"name": "protein"}, "backbone": backbone, "head": head}
