import gzip
import random
import zipfile
from pathlib import Path

import pytest
from processive.chem.readers import read, write_smiles
from processive.errors import ConfigError, InputError

pytest.importorskip("rdkit")

MOLECULES = ["CCO", "c1ccccc1", "CC(=O)O", "C[C@@H](N)C(=O)O"]


def write(path, text):
    path.write_text(text)
    return path


def rows(records):
    return [(record.number, record.text, record.name) for record in records]


def test_smiles_list_keeps_line_numbers_names_and_order(tmp_path):
    path = write(tmp_path / "a.smi", "# a comment\nCCO\tethyl alcohol\n\n  c1ccccc1 benzene\n// more\nO\n")
    records = read(path)
    assert records.path == path
    assert rows(records) == [(2, "CCO", "ethyl alcohol"), (4, "c1ccccc1", "benzene"), (6, "O", "")]
    assert not records.rejected


@pytest.mark.parametrize("header", ["smiles name", "SMILES", "canonical_smiles"])
def test_header_of_a_list_is_no_molecule(tmp_path, header):
    assert [record.text for record in read(write(tmp_path / "a.smi", f"{header}\nCCO one\nCC two\n"))] == ["CCO", "CC"]


def test_a_list_without_header_loses_no_first_line(tmp_path):
    assert len(read(write(tmp_path / "a.txt", "CCO\nCC\n"))) == 2


@pytest.mark.parametrize("delimiter", [",", "\t", ";"])
@pytest.mark.parametrize("name", ["a.csv", "a.txt"])
def test_table_column_is_found_by_name(tmp_path, delimiter, name):
    lines = [["id", "y", "Smiles"], ["m1", "0.1", "CCO "], [], ["m2", "0.2", "CC"], ["m3", "", ""]]
    records = read(write(tmp_path / name, "\n".join(delimiter.join(line) for line in lines)))
    assert rows(records) == [(2, "CCO", "m1"), (4, "CC", "m2"), (5, "", "m3")]
    assert [record.number for record in records.rejected] == [5]
    assert "no SMILES" in records.rejected[0].problem.reason


def test_table_with_quoted_line_breaks_and_a_named_column(tmp_path):
    text = 'note,structure,smiles\n"two\nlines, one cell",CCO,C\nshort,CCC,CC\n'
    path = write(tmp_path / "a.csv", text)
    assert rows(read(path, column="Structure")) == [(2, "CCO", ""), (4, "CCC", "")]
    assert [record.text for record in read(path)] == ["C", "CC"]


def test_table_without_the_column_names_those_there_are(tmp_path):
    path = write(tmp_path / "a.csv", "name,y\nCCO,1\n")
    with pytest.raises(InputError, match=r"No column is called smiles; there are: name, y\."):
        read(path)
    with pytest.raises(InputError, match="No column is called 'structure'"):
        read(path, column="structure")


def test_doubled_backslashes_of_a_table_become_single(tmp_path):
    text = "F/C=C\\\\F"
    assert read(write(tmp_path / "a.csv", f"smiles\n{text}\n"))[0].text == "F/C=C\\F"
    assert read(write(tmp_path / "b.csv", "smiles\nF/C=C\\F\n"))[0].text == "F/C=C\\F"
    assert read(write(tmp_path / "a.smi", f"{text}\n"))[0].text == text


@pytest.mark.parametrize("member", ["train", "train.csv", "folder/train.smi.txt"])
def test_zip_of_one_file(tmp_path, member):
    path = tmp_path / "a.zip"
    body = "smiles,y\nCCO,1\nCC,2\n" if member.endswith("csv") else "CCO\nCC\n"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, body)
        archive.writestr("__MACOSX/._train", b"\x00")
    assert [record.text for record in read(path)] == ["CCO", "CC"]


def test_gzip_and_zstandard(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"smiles\nCCO\n"))
    (tmp_path / "a.smi.zst").write_bytes(zstandard.ZstdCompressor().compress(b"CC\n"))
    assert read(tmp_path / "a.csv.gz")[0].text == "CCO"
    assert read(tmp_path / "a.smi.zst")[0].text == "CC"


@pytest.mark.parametrize("suffix", [".sdf", ".sdf.gz"])
def test_sdf(tmp_path, suffix):
    from rdkit import Chem

    blocks = []
    for number, smiles in enumerate(MOLECULES):
        molecule = Chem.MolFromSmiles(smiles)
        molecule.SetProp("_Name", f"m{number}")
        blocks.append(Chem.MolToMolBlock(molecule) + "> <logP>\n1.0\n\n")
    blocks[1] = blocks[1].replace("  6  6  0", "  9  6  0")  # more atoms promised than given
    body = "$$$$\n".join(blocks).encode() + b"$$$$\n"
    path = tmp_path / f"a{suffix}"
    path.write_bytes(gzip.compress(body) if suffix.endswith("gz") else body)
    records = read(path)
    want = [Chem.CanonSmiles(smiles) for smiles in MOLECULES]
    assert rows(records.usable) == [(1, want[0], "m0"), (3, want[2], "m2"), (4, want[3], "m3")]
    assert [(record.number, record.name) for record in records.rejected] == [(2, "m1")]


@pytest.mark.parametrize(
    ("smiles", "reason", "position"),
    [
        ("CCX", "'X' is not known", 3),
        ("C(C)(C)(C)(C)C", "Explicit valence for atom # 0 C, 5, is greater than permitted", None),
        ("c1cccc1", "kekulize", None),
        ("CC(C", "parenthesis opened here is not closed", 3),
        ("CC)C", "closed that was not opened", 3),
        ("C1CC", "ring bond 1 opened here", 2),
        ("CC%12CC%(13)C%12", "ring bond 13 opened here", 8),
        ("[1CH3]C2CC[2H]", "ring bond 2 opened here", 8),
        ("C==C", "RDKit cannot parse it", None),
        ("C[]", "RDKit cannot parse it", None),
    ],
)
def test_unusable_record_stays_in_place_with_the_reason(tmp_path, capfd, smiles, reason, position):
    records = read(write(tmp_path / "a.smi", f"CCO\n{smiles} broken\nCC\n"))
    assert [record.text for record in records] == ["CCO", smiles, "CC"]
    problem = records[1].problem
    assert records.rejected == [records[1]]
    assert reason in problem.reason
    assert (problem.record, problem.name, problem.position) == (2, "broken", position)
    assert capfd.readouterr() == ("", "")  # RDKit's own messages stay away


def test_without_sanitize_only_the_tokenizer_is_asked(tmp_path):
    records = read(write(tmp_path / "a.smi", "C1CC\nCCX\n"), sanitize=False)
    assert [record.problem is None for record in records] == [True, False]


def test_one_percent_broken_lines(tmp_path):
    rng = random.Random(0)
    lines = [rng.choice(MOLECULES) for _ in range(1000)]
    broken = sorted(rng.sample(range(1000), 10))
    for i in broken:
        lines[i] = rng.choice(["C1CC", "Xx", "c1cccc1", "not a molecule", "C(C"])
    records = read(write(tmp_path / "a.smi", "\n".join(lines)))
    assert len(records) == 1000
    assert [record.number - 1 for record in records.rejected] == broken
    with pytest.raises(InputError, match=f"record {broken[0] + 1}.* 9 more of 1000"):
        records.checked("raise")
    with pytest.warns(UserWarning, match="10 of 1000 records cannot be used"):
        assert len(records.checked("skip")) == 1000


def cut_gzip(path):
    path.write_bytes(gzip.compress("\n".join(MOLECULES * 100).encode())[:-40])


def cut_zip(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a", "\n".join(MOLECULES * 100))
    path.write_bytes(path.read_bytes()[:-60])


def damaged_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a", "CCO\n" * 100)
    path.write_bytes(path.read_bytes().replace(b"CCO", b"CCN", 1))


def zip_of_two(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.smi", "C\n")
        archive.writestr("b.smi", "C\n")


def zip_of_binary(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.smi", b"\xff\xfe\x00\x80")


@pytest.mark.parametrize(
    ("name", "make", "reason"),
    [
        ("a.smi", lambda path: None, "no such file"),
        ("a.smi", Path.touch, "empty"),
        ("a.smi", Path.mkdir, "directory"),
        ("a.smi", lambda path: path.write_bytes(bytes(range(256)) * 4), "not a text file"),
        ("a.smi", lambda path: path.write_bytes(b"CCO\n\x00\x01\n"), "not a text file"),
        ("a.csv", lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n\xff\xff"), "not a text file"),
        ("a.smi", lambda path: path.write_text("\n \n\n"), "no molecule"),
        ("a.smi", lambda path: path.write_text("smiles name\n"), "no molecule"),
        ("a.csv", lambda path: path.write_text("smiles,y\n"), "no molecule"),
        ("a.sdf", lambda path: path.write_text("\n"), "no molecule"),
        ("a.smi.gz", cut_gzip, "damaged or cut short"),
        ("a.zip", cut_zip, "damaged, cut short"),
        ("a.zip", damaged_zip, "damaged, cut short"),
        ("a.zip", zip_of_two, r"2 files \(a.smi, b.smi\)"),
        ("a.zip", zip_of_binary, "not a text file"),
    ],
)
def test_a_file_that_cannot_be_read_gives_one_line_with_its_name(tmp_path, name, make, reason):
    path = tmp_path / name
    make(path)
    with pytest.raises(InputError, match=reason) as caught:
        read(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_all_of_nci_is_read():
    from rdkit import RDConfig

    records = read(Path(RDConfig.RDDataDir) / "NCI" / "first_5K.smi")
    assert (len(records), len(records.usable)) == (4999, 4991)
    assert all("permitted" in record.problem.reason for record in records.rejected)


@pytest.mark.shared_data
@pytest.mark.parametrize(
    ("name", "total", "usable"),
    [
        ("moleculenet/esol.csv", 1128, 1128),
        ("moleculenet/bbbp.csv", 2050, 2039),
        ("captions/chebi20_validation.txt", 3301, 3301),
        ("salts/cdk2.sdf", 47, 47),
    ],
)
def test_published_files_are_read(shared, name, total, usable):
    records = read(shared / "chem" / name)
    assert (len(records), len(records.usable)) == (total, usable)
    assert not any("\\\\" in record.text for record in records)


def test_written_smiles_read_back(tmp_path):
    path = tmp_path / "designs.smi"
    write_smiles(path, ["CCO", "c1ccccc1"])
    read_back = [(record.text, record.name) for record in read(path)]
    assert read_back == [("CCO", "molecule_1"), ("c1ccccc1", "molecule_2")]
    with pytest.raises(ConfigError, match="1 names for 2 molecules"):
        write_smiles(path, ["CCO", "CC"], ["one"])
    assert len(read(path)) == 2
