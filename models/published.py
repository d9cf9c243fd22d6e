"""Models by the names that fair-esm gives them: from where its own loader has them, into the cache that it uses."""

from __future__ import annotations

from pathlib import Path
from urllib.error import URLError

import torch

from ..errors import InputError
from .weights import CONTACTS

SOURCE = "https://dl.fbaipublicfiles.com/fair-esm"
FAIR_ESM = (
    "esm2_t6_8M_UR50D",
    "esm2_t12_35M_UR50D",
    "esm2_t30_150M_UR50D",
    "esm2_t33_650M_UR50D",
    "esm2_t36_3B_UR50D",
    "esm2_t48_15B_UR50D",
)
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
