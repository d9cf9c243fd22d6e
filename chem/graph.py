"""Molecules to graphs: integer categories for every atom and bond, ready for an embedding table."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from ..errors import InputError, needs
from .molecules import parse_smiles

if TYPE_CHECKING:
    from rdkit.Chem import Atom, Bond, Mol
    from torch_geometric.data import Data
else:
    Atom = Bond = Mol = Data = object

# Number of categories of each column. The last one of a column is "other", so that no molecule RDKit can read fails.
ATOM_CATEGORIES = {
    "atomic_number": 120,  # 0 is a dummy atom (*)
    "degree": 8,  # hydrogens counted
    "formal_charge": 8,  # -3 to 3
    "hydrogens": 6,
    "radical_electrons": 4,
    "hybridization": 8,  # S, SP, SP2, SP3, SP3D, SP3D2, unspecified
    "aromatic": 2,
    "in_ring": 2,
    "chirality": 4,  # none, clockwise, counter-clockwise
}
BOND_CATEGORIES = {
    "type": 6,  # single, double, triple, aromatic, dative
    "stereo": 4,  # none, Z (cis), E (trans)
    "conjugated": 2,
    "in_ring": 2,
}


# RDKit's enumerations by number (their objects are integers): what each number's category is.
_HYBRIDIZATION = {1: 0, 2: 1, 3: 2, 4: 3, 6: 4, 7: 5, 0: 6}
_CHIRALITY = {0: 0, 1: 1, 2: 2}
_BOND_TYPE = {1: 0, 2: 1, 3: 2, 12: 3, 17: 4}
_STEREO = {0: 0, 2: 1, 4: 1, 3: 2, 5: 2}


def molecule_graph(molecule: str | Mol) -> Data:
    """Return the graph of a SMILES or a sanitised RDKit molecule: hydrogens implicit, atoms in their own order.

    ``x`` int64 [atoms, 9] and ``edge_attr`` int64 [edges, 4] hold categories (columns and sizes in ``ATOM_CATEGORIES``
    and ``BOND_CATEGORIES``); ``edge_index`` int64 [2, edges] holds each bond in both directions, and is [2, 0] for a
    single atom. What has no category of its own goes to the last one of its column.

    >>> molecule_graph("CCO")
    Data(x=[3, 9], edge_index=[2, 4], edge_attr=[4, 4])

    Raises:
        InputError: the SMILES cannot be read, or the molecule has no atom.
    """
    with needs("graphs"):
        from torch_geometric.data import Data
    molecule = parse_smiles(molecule) if isinstance(molecule, str) else molecule
    atoms = molecule.GetNumAtoms()
    if not atoms:
        raise InputError("The molecule has no atom.")
    x = np.array([_atom(molecule.GetAtomWithIdx(i)) for i in range(atoms)], dtype=np.int64)
    bonds = np.array([_bond(molecule.GetBondWithIdx(i)) for i in range(molecule.GetNumBonds())], dtype=np.int64)
    bonds = bonds.reshape(-1, 2 + len(BOND_CATEGORIES))
    ends = bonds[:, :2]
    edge_index = np.stack([ends, ends[:, ::-1]], axis=1).reshape(-1, 2).T
    edge_attr = bonds[:, 2:].repeat(2, axis=0)
    return Data(
        x=torch.from_numpy(x),
        edge_index=torch.from_numpy(np.ascontiguousarray(edge_index)),
        edge_attr=torch.from_numpy(edge_attr),
    )


def _atom(atom: Atom) -> tuple[int, ...]:
    return (
        min(atom.GetAtomicNum(), 119),
        min(atom.GetTotalDegree(), 7),
        charge + 3 if -3 <= (charge := atom.GetFormalCharge()) <= 3 else 7,
        min(atom.GetTotalNumHs(), 5),
        min(atom.GetNumRadicalElectrons(), 3),
        _HYBRIDIZATION.get(atom.GetHybridization(), 7),
        atom.GetIsAromatic(),
        atom.IsInRing(),
        _CHIRALITY.get(atom.GetChiralTag(), 3),
    )


def _bond(bond: Bond) -> tuple[int, ...]:
    return (
        bond.GetBeginAtomIdx(),
        bond.GetEndAtomIdx(),
        _BOND_TYPE.get(bond.GetBondType(), 5),
        _STEREO.get(bond.GetStereo(), 3),
        bond.GetIsConjugated(),
        bond.IsInRing(),
    )
