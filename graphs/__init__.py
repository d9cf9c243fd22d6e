"""Graph encoders on torch-geometric, and GNN adapters over the hidden states of a frozen language model.

Nothing here knows of molecules, residues or cells; ``chem``, ``bio`` and ``cells`` make the graphs.
torch-geometric is imported when a name is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .adapter import (
        GraphAdapter,
        GraphAdapterConfig,
        NodeClassifier,
        next_token_loss,
        node_vectors,
        token_weights,
    )
    from .encoder import GraphEncoder, GraphEncoderConfig

_HOMES = {
    "GraphAdapter": "adapter",
    "GraphAdapterConfig": "adapter",
    "GraphEncoder": "encoder",
    "GraphEncoderConfig": "encoder",
    "NodeClassifier": "adapter",
    "next_token_loss": "adapter",
    "node_vectors": "adapter",
    "token_weights": "adapter",
}

__all__ = [
    "GraphAdapter",
    "GraphAdapterConfig",
    "GraphEncoder",
    "GraphEncoderConfig",
    "NodeClassifier",
    "next_token_loss",
    "node_vectors",
    "token_weights",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return list(__all__)
