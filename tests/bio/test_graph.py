import gzip

import numpy as np
import pytest
import torch
from processive.bio.graph import AMINO_ACIDS, contact_graph
from processive.errors import InputError

# name of residue, chain, number, atoms with their places
RESIDUES = [
    ("MET", "A", 1, {"CA": (0, 0, 0), "CB": (0, 1.5, 0)}),
    ("GLY", "A", 2, {"CA": (3.8, 0, 0)}),
    ("TRP", "A", 3, {"CA": (7.6, 0, 0), "CB": (7.6, -1.5, 0)}),
    ("ALA", "A", 5, {"CA": (15.2, 0, 0), "CB": (15.2, 1.5, 0)}),
    ("MSE", "B", 1, {"CA": (0, 6, 0), "CB": (0, 4.5, 0)}),
    ("HOH", "B", 99, {"O": (1, 1, 1)}),
]


def pdb_text(residues):
    lines, number = [], 0
    for name, chain, place, atoms in residues:
        for atom, (x, y, z) in atoms.items():
            number += 1
            kind = "HETATM" if name in ("HOH", "MSE") else "ATOM"
            lines.append(
                f"{kind:<6}{number:>5}  {atom:<3} {name} {chain}{place:>4}    {x:>8.3f}{y:>8.3f}{z:>8.3f}  1.00  0.00"
                f"          {atom[0]:>2}"
            )
    return "\n".join([*lines, "END", ""])


@pytest.fixture
def pdb(tmp_path):
    path = tmp_path / "small.pdb"
    path.write_text(pdb_text(RESIDUES))
    return path


def cif(pdb):
    from Bio.PDB import MMCIFIO, PDBParser

    path = pdb.with_suffix(".cif")
    writer = MMCIFIO()
    writer.set_structure(PDBParser(QUIET=True).get_structure("small", str(pdb)))
    writer.save(str(path))
    return path


def zipped(pdb):
    path = pdb.with_suffix(".pdb.gz")
    path.write_bytes(gzip.compress(pdb.read_bytes()))
    return path


@pytest.mark.parametrize("form", [lambda path: path, cif, zipped], ids=["pdb", "mmcif", "gz"])
def test_contacts_equal_all_pairs(pdb, form):
    graph = contact_graph(form(pdb), cutoff=8)
    assert graph.sequence == "MGWAM"
    assert graph.residues == ["A:1", "A:2", "A:3", "A:5", "B:1"]
    assert [AMINO_ACIDS[i] for i in graph.x[:, 0]] == list("MGWAM")
    want = np.array([(0, 1.5, 0), (3.8, 0, 0), (7.6, -1.5, 0), (15.2, 1.5, 0), (0, 4.5, 0)])
    np.testing.assert_allclose(graph.pos, want, atol=1e-3)
    distances = np.linalg.norm(want[:, None] - want[None], axis=-1)
    i, j = np.nonzero((distances <= 8) & ~np.eye(5, dtype=bool))
    assert graph.edge_index.T.tolist() == np.stack([i, j], axis=1).tolist()
    np.testing.assert_allclose(graph.edge_attr[:, 0], distances[i, j], atol=1e-3)


def test_cutoff_atom_and_chain(pdb):
    assert contact_graph(pdb, cutoff=3.5).edge_index.T.tolist() == [[0, 4], [4, 0]]
    assert contact_graph(pdb, cutoff=4, atom="CA").edge_index.T.tolist() == [[0, 1], [1, 0], [1, 2], [2, 1]]
    alone = contact_graph(pdb, chain="B")
    assert alone.sequence == "M"
    assert alone.edge_index.shape == (2, 0)
    assert alone.edge_attr.shape == (0, 1)


def test_missing_atom_keeps_its_place(pdb):
    text = pdb_text([*RESIDUES[:2], ("TRP", "A", 3, {"CA": (7.6, 0, 0)}), *RESIDUES[3:]])
    pdb.write_text(text)
    with pytest.warns(UserWarning, match=r"1 of 5 residues lack their CB atom and have no contact: A:3"):
        graph = contact_graph(pdb)
    assert graph.pos[2].isnan().all()
    assert 2 not in graph.edge_index
    assert graph.sequence == "MGWAM"


def test_random_coil_equals_brute_force(tmp_path, rng):
    places = rng.normal(size=(60, 3)) * 12
    path = tmp_path / "coil.pdb"
    path.write_text(pdb_text([("ALA", "A", n + 1, {"CA": p, "CB": p + 1}) for n, p in enumerate(places)]))
    graph = contact_graph(path, cutoff=10.0)
    distances = torch.cdist(graph.pos, graph.pos, compute_mode="donot_use_mm_for_euclid_dist")
    want = ((distances <= 10) & ~torch.eye(60, dtype=torch.bool)).nonzero()
    assert torch.equal(graph.edge_index.T, want)


def test_bad_input(pdb, tmp_path):
    with pytest.raises(InputError, match=r"no chain 'C'.*A, B"):
        contact_graph(pdb, chain="C")
    with pytest.raises(InputError, match="cutoff"):
        contact_graph(pdb, cutoff=0)
    with pytest.raises(InputError, match="no such file"):
        contact_graph(tmp_path / "absent.pdb")
    text = tmp_path / "notes.txt"
    text.write_text("nothing of a structure\n")
    with pytest.raises(InputError, match="neither a PDB nor an mmCIF"):
        contact_graph(text)
    water = tmp_path / "water.pdb"
    water.write_text(pdb_text(RESIDUES[-1:]))
    with pytest.raises(InputError, match="no amino acid"):
        contact_graph(water)
    traces = tmp_path / "trace.pdb"
    traces.write_text(pdb_text([("ALA", "A", n, {"CA": (4 * n, 0, 0)}) for n in (1, 2)]))
    with pytest.raises(InputError, match="None of the 2 residues has its CB atom"):
        contact_graph(traces)
    broken = tmp_path / "broken.cif"
    broken.write_text("data_x\nloop_\n_atom_site.id\n1\n")
    with pytest.raises(InputError, match="cannot be read"):
        contact_graph(broken)
