"""The face of the package: a model with its verbs.

>>> import processive as pv
>>> model = pv.load("runs/chem")
>>> model.score(["CCO"])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from . import models
from .models import LanguageModel
from .sequences import Tokenizer


class Model(LanguageModel):
    """A language model with the verbs of ``processive.inference``.

    A record is what the model's tokenizer encodes: a SMILES, DNA or protein string. Files, AnnData and records that may
    be broken are for the verbs of the domains (``processive.chem``, ``bio``, ``cells``).
    """

    def generate(
        self,
        count: int | None = None,
        *,
        prompts: str | Sequence[str] | None = None,
        suffixes: str | Sequence[str] | None = None,
        gaps: int | Sequence[int] | None = None,
        temperature: float | int = 1.0,
        top_k: int | None = None,
        top_p: float | int | None = None,
        min_p: float | int | None = None,
        max_length: int = 512,
        stop: str | Sequence[str] | None = None,
        seed: int = 0,
        batch_size: int = 256,
        conditions: Mapping[str, int] | None = None,
        progress: bool = False,
    ) -> list[str]:
        """Return generated texts, ``count`` of each prompt; see ``inference.generate``."""
        from . import inference

        return inference.generate(
            self,
            count,
            prompts=prompts,
            suffixes=suffixes,
            gaps=gaps,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            max_length=max_length,
            stop=stop,
            seed=seed,
            batch_size=batch_size,
            conditions=conditions,
            progress=progress,
        )

    def embed(
        self,
        records: Sequence[Any],
        *,
        layer: int | Sequence[int] = -1,
        pooling: Literal["mean", "last", "tokens"] = "mean",
        batch_tokens: int = 8192,
        progress: bool = False,
    ) -> Any:
        """Return float32 [records, width], or a list of [tokens, width] with "tokens"; see ``inference.embed``."""
        from . import inference

        return inference.embed(
            self, records, layer=layer, pooling=pooling, batch_tokens=batch_tokens, progress=progress
        )

    def score(
        self,
        records: Sequence[Any],
        *,
        conditions: Mapping[str, int] | None = None,
        batch_tokens: int = 8192,
        progress: bool = False,
    ) -> NDArray[np.float64]:
        """Return the (pseudo-)log-likelihood of each record in nats, float64 [records]; see ``inference.score``."""
        from . import inference

        return inference.score(self, records, conditions=conditions, batch_tokens=batch_tokens, progress=progress)

    def predict(self, records: Sequence[Any], *, batch_tokens: int = 8192, progress: bool = False) -> Any:
        """Return what the model has learned to say of each record, float64 [records]; see ``inference.predict``."""
        from . import inference

        return inference.predict(self, records, batch_tokens=batch_tokens, progress=progress)


def load(
    path: str | Path,
    *,
    format: str | None = None,
    tokenizer: Tokenizer | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    adapter: str | Path | None = None,
) -> Model:
    """Read a model: one that ``save`` wrote, or a checkpoint of another package.

    Args:
        path: a folder, a file of weights, ``"hf://owner/name"`` or ``"hf://owner/name@revision"``, or a name of
            fair-esm's such as ``"esm2_t33_650M_UR50D"``.
        format: of another package's checkpoint ("hf-esm", ...); None: recognised.
        tokenizer: of another package's checkpoint, in place of the one beside its weights; see ``models.load``.
        device: where the weights go.
        dtype: of the weights; None keeps the stored one. One narrower than float32 is for the matrices of the linear
            maps alone, and everything else is float32: see ``models.load``.
        adapter: folder of an adapter that was trained on the model, to be used; see ``models.load_adapter``.

    Raises:
        InputError: there is no whole language model, or the adapter is of another; the sentence says what is wrong.
        MissingExtra: a model of the hub needs the extra ``hub``.
    """
    model = models.load(path, format=format, tokenizer=tokenizer, device=device, dtype=dtype, cls=Model)
    if adapter is not None:
        models.load_adapter(model, adapter)
    return model
