import pytest
import torch
from processive.chem.graph import ATOM_CATEGORIES, BOND_CATEGORIES, molecule_graph
from processive.errors import InputError
from rdkit import Chem

ATOM = {name: column for column, name in enumerate(ATOM_CATEGORIES)}
BOND = {name: column for column, name in enumerate(BOND_CATEGORIES)}


def column(graph, name):
    values, place = (graph.x, ATOM[name]) if name in ATOM else (graph.edge_attr, BOND[name])
    return values[:, place].tolist()


def test_ethanol():
    graph = molecule_graph("CCO")
    assert graph.edge_index.tolist() == [[0, 1, 1, 2], [1, 0, 2, 1]]
    assert column(graph, "atomic_number") == [6, 6, 8]
    assert column(graph, "hydrogens") == [3, 2, 1]
    assert column(graph, "degree") == [4, 4, 2]
    assert column(graph, "formal_charge") == [3, 3, 3]
    assert column(graph, "type") == [0, 0, 0, 0]


def test_what_columns_say():
    assert column(molecule_graph("c1ccccc1"), "aromatic") == [1] * 6
    assert column(molecule_graph("c1ccccc1"), "type") == [3] * 12
    assert column(molecule_graph("[O-]C=O"), "formal_charge") == [2, 3, 3]
    assert column(molecule_graph("[CH3]"), "radical_electrons") == [1]
    assert column(molecule_graph("C#CC"), "hybridization") == [1, 1, 3]
    left, right = (column(molecule_graph(s), "chirality") for s in ("C[C@H](N)O", "C[C@@H](N)O"))
    assert sorted([left[1], right[1]]) == [1, 2]
    cis, trans = (column(molecule_graph(s), "stereo") for s in (r"F/C=C\F", "F/C=C/F"))
    assert (cis[2], trans[2]) == (1, 2)
    assert column(molecule_graph("C=CC=C"), "conjugated") == [1] * 6
    assert column(molecule_graph("C1CC1C"), "in_ring") == [1, 1, 1, 0]


@pytest.mark.parametrize(
    "smiles",
    [
        "[Og]",
        "*C",
        "[Na+].[Cl-]",
        "[H][H]",
        "[Fe+6]",
        "F[P-](F)(F)(F)(F)F",
        "[Pt@SP1](Cl)(Cl)(N)N",
        "[Cu-3]12([O+]=C(C)C=C(C)O1)[O+]=C(C)C=C(C)O2",
        "N->[Pt]",
        "[CH2]$[CH2]",
        "FS(F)(F)(F)(F)F",
        "[AsH5]",
        "[C]",
        "FI(F)(F)(F)(F)(F)F",
    ],
)
def test_odd_molecules_stay_in_range(smiles):
    molecule = Chem.MolFromSmiles(smiles, sanitize=False)
    molecule.UpdatePropertyCache(strict=False)
    Chem.FastFindRings(molecule)
    Chem.SetHybridization(molecule)
    graph = molecule_graph(molecule)
    assert len(graph.x) == molecule.GetNumAtoms()
    for values, sizes in ((graph.x, ATOM_CATEGORIES), (graph.edge_attr, BOND_CATEGORIES)):
        assert values.shape[1] == len(sizes)
        assert (values >= 0).all()
        assert (values < torch.tensor(list(sizes.values()))).all()


def test_no_category_of_its_own_is_other():
    molecule = Chem.MolFromSmiles("CC")
    molecule.GetAtomWithIdx(0).SetHybridization(Chem.HybridizationType.SP2D)
    molecule.GetBondWithIdx(0).SetBondType(Chem.BondType.QUINTUPLE)
    graph = molecule_graph(molecule)
    assert column(graph, "hybridization")[0] == ATOM_CATEGORIES["hybridization"] - 1
    assert column(graph, "type")[0] == BOND_CATEGORIES["type"] - 1


def test_single_atom():
    graph = molecule_graph("C")
    assert graph.x.shape == (1, 9)
    assert graph.edge_index.shape == (2, 0)
    assert graph.edge_attr.shape == (0, 4)
    assert graph.edge_index.dtype == graph.edge_attr.dtype == torch.int64


@pytest.mark.parametrize("smiles", ["", "C1CC", "CC(", "c1cccc1", "C(C)(C)(C)(C)C", "hello"])
def test_unreadable(smiles):
    with pytest.raises(InputError):
        molecule_graph(smiles)


def test_no_atom():
    with pytest.raises(InputError, match="no atom"):
        molecule_graph(Chem.Mol())
