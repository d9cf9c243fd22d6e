"""Protein structures to residue contact graphs."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from ..errors import InputError, needs
from ..sequences import open_text

if TYPE_CHECKING:
    from Bio.PDB.Residue import Residue
    from torch_geometric.data import Data
else:
    Residue = Data = object

AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWYX"  # ids of contact_graph's x; X is any other residue


def contact_graph(
    path: str | Path, *, cutoff: float | int = 8.0, atom: Literal["CA", "CB"] = "CB", chain: str | None = None
) -> Data:
    """Return the graph whose nodes are residues and whose edges join those closer than ``cutoff`` angstrom.

    Reads PDB and mmCIF files, plain, gz or zst, told apart by their content. Only the first model is read; of
    alternative locations the one of highest occupancy counts. Water, ligands and nucleotides are not residues; a
    modified amino acid, such as selenomethionine, stands for its parent. Distances are between C-beta atoms (C-alpha
    in glycine), or between C-alpha atoms.

    The graph has ``x`` int64 [residues, 1] (places in ``AMINO_ACIDS``), ``pos`` float32 [residues, 3] in angstrom,
    ``edge_index`` int64 [2, edges] in both directions, ``edge_attr`` float32 [edges, 1] (distances in angstrom),
    ``sequence`` and ``residues`` (names such as "A:42"). A residue without its atom keeps its place, with NaN as
    position and no edge; a warning names it.

    >>> contact_graph("1ubq.cif", cutoff=8.0, chain="A")
    Data(x=[76, 1], edge_index=[2, 724], edge_attr=[724, 1], pos=[76, 3], sequence='MQIF...', residues=[76])

    Raises:
        InputError: the file cannot be read, there is no such chain, or no residue has the atom.
    """
    with needs("bio"):
        from Bio.Data.PDBData import protein_letters_3to1_extended
        from Bio.PDB.kdtrees import KDTree
    with needs("graphs"):
        from torch_geometric.data import Data

    if cutoff <= 0:
        raise InputError(f"The cutoff is {cutoff} angstrom; it is a positive distance.")
    if atom not in ("CA", "CB"):
        raise InputError(f"atom is {atom!r}; contacts are measured between 'CB' or 'CA' atoms.")
    chains = {c.id: c for c in _first_model(path)}
    if chain is not None and chain not in chains:
        raise InputError(f"There is no chain {chain!r}.", path=path, hint=f"The chains are {', '.join(chains)}.")
    letters = protein_letters_3to1_extended
    residues = [
        residue
        for c in (chains.values() if chain is None else [chains[chain]])
        for residue in c
        if residue.resname.strip() in letters or (residue.id[0] == " " and "CA" in residue)
    ]
    if not residues:
        where = "" if chain is None else f" in chain {chain!r}"
        raise InputError(f"There is no amino acid{where}.", path=path)
    names = [f"{residue.get_parent().id}:{residue.id[1]}{residue.id[2].strip()}" for residue in residues]
    sequence = "".join(letters.get(residue.resname.strip(), "X") for residue in residues)
    positions = np.array([_position(residue, atom) for residue in residues])
    placed = np.flatnonzero(~np.isnan(positions).any(1))
    if not len(placed):
        raise InputError(f"None of the {len(residues)} residues has its {atom} atom.", path=path)
    if len(placed) < len(residues):
        missing = [name for name, here in zip(names, ~np.isnan(positions).any(1), strict=True) if not here]
        warnings.warn(
            f"{path}: {len(missing)} of {len(residues)} residues lack their {atom} atom and have no contact: "
            f"{', '.join(missing[:10])}{', ...' if len(missing) > 10 else ''}",
            stacklevel=2,
        )
    pairs = KDTree(positions[placed], 10).neighbor_search(float(cutoff)) if len(placed) > 1 else []
    found = sorted((int(placed[pair.index1]), int(placed[pair.index2]), pair.radius) for pair in pairs)
    both = sorted(found + [(j, i, distance) for i, j, distance in found])
    edges = torch.tensor([(i, j) for i, j, _ in both], dtype=torch.int64).reshape(-1, 2)
    return Data(
        x=torch.tensor([[AMINO_ACIDS.index(letter) if letter in AMINO_ACIDS else 20] for letter in sequence]),
        pos=torch.from_numpy(positions).float(),
        edge_index=edges.T.contiguous(),
        edge_attr=torch.tensor([[distance] for *_, distance in both], dtype=torch.float32).reshape(-1, 1),
        sequence=sequence,
        residues=names,
    )


def _first_model(path: str | Path) -> Any:
    """Chains of a structure file's first model."""
    with needs("bio"):
        from Bio.PDB.MMCIFParser import MMCIFParser
        from Bio.PDB.PDBExceptions import PDBConstructionException
        from Bio.PDB.PDBParser import PDBParser

    with open_text(path) as text:
        content = text.read()
    lines = [line for line in content.splitlines() if line.strip() and not line.startswith("#")]
    mmcif = bool(lines) and lines[0].lower().startswith("data_")
    if not mmcif and not any(line.startswith(("ATOM", "HETATM")) for line in lines):
        raise InputError("This is neither a PDB nor an mmCIF file with atoms.", path=path)
    parser = (MMCIFParser if mmcif else PDBParser)(QUIET=True)
    try:
        models = list(parser.get_structure("structure", io.StringIO(content)))  # type: ignore[no-untyped-call]
    except (PDBConstructionException, KeyError, ValueError) as error:
        raise InputError(f"The structure cannot be read ({error}).", path=path) from None
    if not models:
        raise InputError("The structure holds no model.", path=path)
    return models[0]


def _position(residue: Residue, atom: str) -> list[float]:
    """Coordinates in angstrom of the atom that contacts are measured from; NaN without it."""
    name = "CA" if residue.resname.strip() == "GLY" else atom
    return [float(v) for v in residue[name].coord] if name in residue else [float("nan")] * 3
