"""Small molecules as SMILES: read, tokenize, embed, score, generate, report, draw, split, predict.

>>> from processive import chem
>>> molecules = chem.read("molecules.smi").checked("skip")
>>> print(chem.report(model.generate(1000), [record.text for record in molecules.usable]))

RDKit, matplotlib and torch-geometric are imported when a name is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .draw import draw_map, draw_molecules, draw_properties
    from .graph import ATOM_CATEGORIES, BOND_CATEGORIES, molecule_graph
    from .metrics import (
        MoleculeReport,
        internal_diversity,
        novelty,
        property_table,
        report,
        uniqueness,
        validity,
        wasserstein,
    )
    from .molecules import canonical_smiles, parse_smiles
    from .properties import PropertyPredictor
    from .readers import chunks, read, write_smiles
    from .splits import Split, random_split, read_split, scaffold_groups, scaffold_split, write_split
    from .tasks import embed, generate, make_tokenizer, score, tokenize
    from .tokenizer import SmilesTokenizer

_HOMES = {
    "ATOM_CATEGORIES": "graph",
    "BOND_CATEGORIES": "graph",
    "MoleculeReport": "metrics",
    "PropertyPredictor": "properties",
    "SmilesTokenizer": "tokenizer",
    "Split": "splits",
    "canonical_smiles": "molecules",
    "chunks": "readers",
    "draw_map": "draw",
    "draw_molecules": "draw",
    "draw_properties": "draw",
    "embed": "tasks",
    "generate": "tasks",
    "internal_diversity": "metrics",
    "make_tokenizer": "tasks",
    "molecule_graph": "graph",
    "novelty": "metrics",
    "parse_smiles": "molecules",
    "property_table": "metrics",
    "random_split": "splits",
    "read": "readers",
    "read_split": "splits",
    "report": "metrics",
    "scaffold_groups": "splits",
    "scaffold_split": "splits",
    "score": "tasks",
    "tokenize": "tasks",
    "uniqueness": "metrics",
    "validity": "metrics",
    "wasserstein": "metrics",
    "write_smiles": "readers",
    "write_split": "splits",
}

__all__ = [
    "ATOM_CATEGORIES",
    "BOND_CATEGORIES",
    "MoleculeReport",
    "PropertyPredictor",
    "SmilesTokenizer",
    "Split",
    "canonical_smiles",
    "chunks",
    "draw_map",
    "draw_molecules",
    "draw_properties",
    "embed",
    "generate",
    "internal_diversity",
    "make_tokenizer",
    "molecule_graph",
    "novelty",
    "parse_smiles",
    "property_table",
    "random_split",
    "read",
    "read_split",
    "report",
    "scaffold_groups",
    "scaffold_split",
    "score",
    "tokenize",
    "uniqueness",
    "validity",
    "wasserstein",
    "write_smiles",
    "write_split",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return list(__all__)
