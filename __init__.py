"""Foundation models for DNA, proteins, small molecules and single cells.

>>> import processive as pv
>>> model = pv.load("runs/chem")
>>> model.generate(100, temperature=0.9)

Rooms and names are imported when first used, so that ``import processive`` is quick and needs no optional package.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import backbones, bio, cells, chem, errors, graphs, inference, kernels, models, sequences, text, training
    from .face import Model, load
    from .predictor import SequencePredictor

    __version__: str

__all__ = [
    "Model",
    "SequencePredictor",
    "__version__",
    "backbones",
    "bio",
    "cells",
    "chem",
    "errors",
    "graphs",
    "inference",
    "kernels",
    "load",
    "models",
    "sequences",
    "text",
    "training",
]


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        return version("processive")
    if name in ("Model", "load"):
        return getattr(import_module(".face", __name__), name)
    if name == "SequencePredictor":
        return import_module(".predictor", __name__).SequencePredictor
    if name in __all__:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
