"""Every verb but `train` and `tokenize` on small data: from a file to a file, rows in the order of the input."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import processive as pv
import pytest
from processive.cli import main


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as handle:
        return list(csv.DictReader(handle))


def test_generate_smiles(chem_model: Path, tmp_path: Path) -> None:
    arguments = ["generate", str(chem_model), "-n", "5", "--temperature", "0.8", "--top-k", "20", "--seed", "3"]
    arguments += ["--prefix", "CC", "--max-length", "12"]
    for name in ("a.smi", "b.smi"):
        assert main([*arguments, "-o", str(tmp_path / name)]) == 0
    lines = (tmp_path / "a.smi").read_text().splitlines()
    assert (tmp_path / "b.smi").read_text().splitlines() == lines
    assert len(lines) == 5
    assert all(line.startswith("CC") and line.endswith(f" chem_{i}") for i, line in enumerate(lines, 1))


def test_generate_fasta(dna_model: Path, tmp_path: Path) -> None:
    assert main(["generate", str(dna_model), "-n", "2", "-o", str(tmp_path / "out.fasta"), "--max-length", "80"]) == 0
    assert [line for line in (tmp_path / "out.fasta").read_text().splitlines() if line[:1] == ">"] == [
        ">dna_1",
        ">dna_2",
    ]


@pytest.mark.parametrize("model", ["protein_model", "cell_model"])
def test_generate_needs_a_causal_model(
    model: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = request.getfixturevalue(model)
    capsys.readouterr()
    assert main(["generate", str(folder), "-n", "2", "-o", str(tmp_path / "out.txt")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("processive: ")
    assert not (tmp_path / "out.txt").exists()


def test_every_verb_takes_a_model_that_reads_a_prefix(prefix_model: Path, inputs: Path, tmp_path: Path) -> None:
    from processive import bio

    model, data = pv.load(prefix_model), str(inputs / "proteins.fasta")
    records = bio.read(inputs / "proteins.fasta", model.tokenizer)
    assert main(["embed", str(prefix_model), data, "-o", str(tmp_path / "out.npz")]) == 0
    with np.load(tmp_path / "out.npz") as written:
        np.testing.assert_array_equal(written["embeddings"], bio.embed(records, model))
    assert main(["score", str(prefix_model), data, "-o", str(tmp_path / "out.csv")]) == 0
    assert [float(row["score"]) for row in rows(tmp_path / "out.csv")] == bio.score(records, model).tolist()
    fasta = tmp_path / "out.fasta"
    options = ["-n", "3", "-o", str(fasta), "--prefix", "MKT", "--suffix", "KQR", "--max-length", "9"]
    assert main(["generate", str(prefix_model), *options]) == 0
    sequences = [record.text for record in bio.read(fasta, model.tokenizer)]
    assert sequences == bio.generate(model, 3, prompts="MKT", suffixes="KQR", max_length=9)
    assert all(text.startswith("MKT") and text.endswith("KQR") for text in sequences)


def test_generate_fills_a_gap_of_a_given_length(
    fill_in_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from processive import bio

    fasta = tmp_path / "out.fasta"
    arguments = ["generate", str(fill_in_model), "-n", "3", "-o", str(fasta), "--prefix", "MKT", "--suffix", "KQR"]
    capsys.readouterr()
    assert main(arguments) == 1
    assert "--gap" in capsys.readouterr().err
    assert main([*arguments, "--gap", "4"]) == 0
    model = pv.load(fill_in_model)
    sequences = [record.text for record in bio.read(fasta, model.tokenizer)]
    assert sequences == bio.generate(model, 3, prompts="MKT", suffixes="KQR", gaps=4)
    assert all(len(text) == 10 and text.startswith("MKT") and text.endswith("KQR") for text in sequences)


def test_generate_with_a_suffix_needs_a_model_that_fills_in(
    dna_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["generate", str(dna_model), "-n", "2", "-o", str(tmp_path / "out.txt"), "--suffix", "ACG"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "fills in" in line


def test_embed_equals_python(chem_model: Path, inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.npz"
    assert main(["embed", str(chem_model), str(inputs / "molecules.smi"), "-o", str(out), "--layer", "0"]) == 0
    from processive import chem

    with np.load(out) as stored:
        want = chem.embed(chem.read(inputs / "molecules.smi"), pv.load(chem_model), layer=0)
        np.testing.assert_array_equal(stored["embeddings"], want)
        assert stored["name"][:2].tolist() == ["ethanol", "benzene"]
        assert stored["smiles"][1] == "c1ccccc1"


def test_embed_keeps_rows_aligned(chem_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in.smi").write_text("CCO a\nC1CC b\n\nCCN c\n")
    capsys.readouterr()
    out = tmp_path / "out.csv"
    assert main(["embed", str(chem_model), str(tmp_path / "in.smi"), "-o", str(out), "--on-error", "skip"]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("processive:")]
    assert len(said) == 1
    assert "warning: " in said[0]
    assert "1 of 3 records cannot be used (records 2)" in said[0]
    table = rows(out)
    assert [row["record"] for row in table] == ["1", "2", "4"]
    assert [row["status"] == "ok" for row in table] == [True, False, True]
    assert [row["e0"] == "NaN" for row in table] == [False, True, False]


def test_embed_per_residue(
    protein_model: Path, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["embed", str(protein_model), str(inputs / "proteins.fasta"), "--pooling", "tokens"]
    capsys.readouterr()
    assert main([*arguments, "-o", str(tmp_path / "out.csv")]) == 1
    assert ".npz" in capsys.readouterr().err
    assert main([*arguments, "-o", str(tmp_path / "out.npz")]) == 0
    want = pv.load(protein_model).embed(["MKTAYIAKQR", "GSHMLEDPVA", "MVLSPADKTNVKAAW"], pooling="tokens")
    with np.load(tmp_path / "out.npz") as stored:
        assert stored["offsets"].tolist() == [0, 10, 20, 35]
        np.testing.assert_array_equal(stored["embeddings"], np.concatenate(want))
        assert stored["name"].tolist() == ["P1", "P2", "P3"]


def test_embed_proteins_to_h5ad(protein_model: Path, inputs: Path, tmp_path: Path) -> None:
    anndata = pytest.importorskip("anndata")
    out = tmp_path / "out.h5ad"
    assert main(["embed", str(protein_model), str(inputs / "proteins.fasta"), "-o", str(out)]) == 0
    adata = anndata.read_h5ad(out)
    assert adata.shape == (3, 16)
    assert adata.obs["name"].tolist() == ["P1", "P2", "P3"]


def test_embed_cells(cell_model: Path, cells: Path, tmp_path: Path) -> None:
    anndata = pytest.importorskip("anndata")
    for name in ("out.h5ad", "out.csv"):
        assert main(["embed", str(cell_model), str(cells), "-o", str(tmp_path / name)]) == 0
    adata = anndata.read_h5ad(tmp_path / "out.h5ad")
    assert adata.obsm["X_cells"].shape == (12, 16)
    assert np.isnan(adata.obsm["X_cells"]).any(axis=1).tolist() == [i == 2 for i in range(12)]
    np.testing.assert_array_equal(adata.X, anndata.read_h5ad(cells).X)
    table = rows(tmp_path / "out.csv")
    assert [row["status"] == "ok" for row in table] == [i != 2 for i in range(12)]
    assert table[0]["name"] == "cell0"


def test_score(dna_model: Path, protein_model: Path, inputs: Path, tmp_path: Path) -> None:
    assert main(["score", str(dna_model), str(inputs / "dna.fasta"), "-o", str(tmp_path / "dna.csv")]) == 0
    from processive import bio

    model = pv.load(dna_model)
    want = bio.score(bio.read(inputs / "dna.fasta", model.tokenizer), model)
    table = rows(tmp_path / "dna.csv")
    assert [row["name"] for row in table] == ["chr1", "chr2"]
    assert [float(row["score"]) for row in table] == want.tolist()
    assert main(["score", str(protein_model), str(inputs / "proteins.fasta"), "-o", str(tmp_path / "p.tsv")]) == 0
    assert len((tmp_path / "p.tsv").read_text().splitlines()) == 4


@pytest.mark.parametrize("given", ["M1A,K2R", "list", "table"])
def test_score_variants(protein_model: Path, tmp_path: Path, given: str) -> None:
    (tmp_path / "wild.fasta").write_text(">P1\nMKTAYIAKQR\n")
    (tmp_path / "list.txt").write_text("M1A\nK2R\n")
    (tmp_path / "table.csv").write_text("DMS_score,mutant\n0.5,M1A\n0.1,K2R\n")
    variants = {"list": str(tmp_path / "list.txt"), "table": str(tmp_path / "table.csv")}.get(given, given)
    out = tmp_path / "out.csv"
    assert (
        main(["score", str(protein_model), str(tmp_path / "wild.fasta"), "-o", str(out), "--variants", variants]) == 0
    )
    table = rows(out)
    assert [row["variant"] for row in table] == ["M1A", "K2R"]
    assert all(np.isfinite(float(row["score"])) for row in table)


@pytest.mark.parametrize(
    ("variants", "said"),
    [("M2A", "'K'"), ("oops", "not a substitution"), (",", "No variant"), ("no.txt", "no such file")],
)
def test_score_refuses_bad_variants(
    protein_model: Path, tmp_path: Path, variants: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "wild.fasta").write_text(">P1\nMKTAYIAKQR\n")
    capsys.readouterr()
    arguments = ["score", str(protein_model), str(tmp_path / "wild.fasta"), "-o", str(tmp_path / "o.csv")]
    assert main([*arguments, "--variants", variants]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


@pytest.mark.parametrize(
    ("model", "data", "variants", "said"),
    [
        ("protein_model", "proteins.fasta", "M1A", "Variants are named on one sequence; the file holds 3."),
        ("chem_model", "molecules.smi", "C1N", "Variants are of DNA and proteins"),
        ("cell_model", "cells.h5ad", None, "masked model"),
    ],
)
def test_score_that_means_nothing(
    model: str,
    data: str,
    variants: str | None,
    said: str,
    inputs: Path,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = request.getfixturevalue(model)
    capsys.readouterr()
    options = ["--variants", variants] if variants else []
    assert main(["score", str(folder), str(inputs / data), "-o", str(tmp_path / "out.csv"), *options]) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out.csv").exists()


def test_score_cells(cells: Path, tmp_path: Path) -> None:
    small = ["--set", "backbone.width=16", "--set", "backbone.depth=1", "--set", "backbone.heads=2", "--steps", "2"]
    causal = ["--set", "backbone.direction=causal", "--set", "training.objective=causal"]
    assert main(["train", "cell-encoder", str(cells), "--out", str(tmp_path / "run"), *small, *causal]) == 0
    assert main(["score", str(tmp_path / "run"), str(cells), "-o", str(tmp_path / "out.csv")]) == 0
    assert [row["score"] == "NaN" for row in rows(tmp_path / "out.csv")] == [i == 2 for i in range(12)]


def test_property_model_from_table_to_predictions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch_geometric")
    alkanes = [f"{'C' * i}{tail}" for i in range(1, 11) for tail in ("O", "N", "c1ccccc1")]
    lines = [f"{i},{smiles},{len(smiles) / 10}" for i, smiles in enumerate(alkanes)]
    (tmp_path / "table.csv").write_text("id,smiles,size\n" + "\n".join(lines) + "\nx,,1\n")
    small = [
        word
        for setting in ("width=8", "depth=1", "ensemble=1", "epochs=2")
        for word in ("--set", f"predictor.{setting}")
    ]
    train = ["train", "molecule-property", str(tmp_path / "table.csv"), "--out", str(tmp_path / "run"), *small]
    assert main([*train, "--target", "weight"]) == 1
    assert "There is no column 'weight'; there are: id, smiles, size." in capsys.readouterr().err
    assert main([*train, "--target", "size"]) == 1
    assert "--on-error skip" in capsys.readouterr().err
    assert main([*train, "--target", "size", "--on-error", "skip", "--seed", "1"]) == 0
    assert "RMSE " in capsys.readouterr().out
    split = json.loads((tmp_path / "run" / "split.json").read_text())
    assert split["seed"] == 1
    assert split["unusable"] == [30]
    (tmp_path / "new.smi").write_text("CCCO a\nCCC1 b\nCCCN c\n")
    predict = ["predict", str(tmp_path / "run"), str(tmp_path / "new.smi"), "-o", str(tmp_path / "out.csv")]
    assert main([*predict, "--on-error", "skip"]) == 0
    table = rows(tmp_path / "out.csv")
    assert [row["smiles"] for row in table] == ["CCCO", "CCC1", "CCCN"]
    assert [row["prediction"] == "NaN" for row in table] == [False, True, False]
    assert main(train) == 1


def test_property_model_of_two_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch_geometric")
    lines = [f"{'C' * i}{tail},{int(tail == 'O')},{i % 2}" for i in range(1, 16) for tail in "ON"]
    (tmp_path / "table.csv").write_text("smiles,alcohol,odd\n" + "\n".join([*lines, "CCCl,,1"]) + "\n")
    small = [
        w for setting in ("width=8", "depth=1", "ensemble=1", "epochs=2") for w in ("--set", f"predictor.{setting}")
    ]
    arguments = ["train", "molecule-property", str(tmp_path / "table.csv"), "--out", str(tmp_path / "run"), *small]
    assert main([*arguments, "--target", "alcohol", "--target", "odd"]) == 0
    assert "ROC AUC " in capsys.readouterr().out
    (tmp_path / "new.smi").write_text("CCCO\nCCCN\n")
    assert main(["predict", str(tmp_path / "run"), str(tmp_path / "new.smi"), "-o", str(tmp_path / "out.tsv")]) == 0
    head, *values = [line.split("\t") for line in (tmp_path / "out.tsv").read_text().splitlines()]
    assert head == ["record", "name", "smiles", "status", "prediction_1", "prediction_2"]
    assert all(0 <= float(value) <= 1 for row in values for value in row[4:])


def test_roc_auc() -> None:
    from processive.cli.train_property import roc_auc

    labels = np.array([0, 0, 1, 1, np.nan])
    assert roc_auc(np.array([0.1, 0.4, 0.35, 0.8, 9.0]), labels) == 0.75
    assert roc_auc(np.array([0.5, 0.5, 0.5, 0.5, 0.0]), labels) == 0.5
    assert np.isnan(roc_auc(np.array([0.5]), np.array([1.0])))


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("smiles,y\nCCO,1\nCCN,high\n", "record 3: 'high' in column y is no number."),
        ("smiles,z\nCCO,1\n", "no column 'y'"),
    ],
)
def test_property_table_that_cannot_be_used(
    table: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "table.csv").write_text(table)
    arguments = ["train", "molecule-property", str(tmp_path / "table.csv"), "--out", str(tmp_path / "run")]
    assert main([*arguments, "--target", "y"]) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_models_lists_runs_and_recipes(
    chem_model: Path, protein_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (chem_model.parent / "other").mkdir(exist_ok=True)
    (chem_model.parent / "other" / "config.json").write_text("[]")
    capsys.readouterr()
    assert main(["models", str(chem_model.parent)]) == 0
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if line.startswith("chem ")]
    parameters = sum(p.numel() for p in pv.load(chem_model).parameters())
    assert line.split() == ["chem", "language-model", "xlstm", f"{parameters:,}", "smiles", str(chem_model)]
    assert any(line.startswith("protein ") for line in lines)
    assert any(line.startswith("chem-xlstm ") for line in lines)
    assert not any(line.startswith("other") for line in lines)


def test_models_of_an_empty_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", str(tmp_path)]) == 0
    assert f"No model in {tmp_path} or the folders in it." in capsys.readouterr().out


def test_models_lists_what_else_can_be_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("esm2_t33_650M_UR50D ") for line in lines)
    assert any(line.startswith("hf-esm ") for line in lines)


def test_models_without_a_folder_looks_here(
    chem_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(chem_model.parent)
    for arguments in (["models"], ["models", "list"], ["models", "list", "."]):
        assert main(arguments) == 0
        assert any(line.startswith("chem ") for line in capsys.readouterr().out.splitlines())


def table_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    capsys.readouterr()
    assert main(["models", "describe", *arguments]) == 0
    return {line[:20].strip(): line[19:].strip() for line in capsys.readouterr().out.splitlines()}


def test_describe_a_folder(chem_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = table_of([str(chem_model)], capsys)
    assert table["parameters"].startswith(f"{pv.load(chem_model).parameters_count:,} (")
    assert "xLSTM, causal, width 16, 1 mLSTM block," in table["architecture"]
    assert table["licence"] == "not stated"
    assert "for any length" in table["memory per sequence"]


@pytest.mark.parametrize("recipe", ["chem-xlstm", "dna-xlstm", "protein-encoder", "cell-encoder"])
@pytest.mark.parametrize("size", ["tiny", "published"])
def test_describe_a_recipe(recipe: str, size: str, capsys: pytest.CaptureFixture[str]) -> None:
    table = table_of([recipe, "--size", size], capsys)
    assert table["name"] == recipe
    assert table["format"] == f"recipe, size {size}"
    assert table["context"].startswith("no fixed limit")
    assert ("parameters" in table) == (recipe != "cell-encoder")


def test_describe_a_name_and_what_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert table_of(["esm2_t6_8M_UR50D"], capsys)["licence"] == "MIT"
    for arguments, said in (
        (["nothing"], "no such model"),
        ([str(tmp_path)], "holds no weights"),
        (["esm2_t6_8M_UR50D", "--size", "tiny"], "A size is of a recipe"),
        (["chem-xlstm", "--size", "huge"], "no size 'huge'"),
    ):
        assert main(["models", "describe", *arguments]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line


def test_labels_from_a_tuned_model_to_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = pv.bio.ProteinTokenizer()
    config = pv.backbones.TransformerConfig(len(tokenizer.vocabulary), 8, 1, heads=2, direction="bidirectional")
    model = pv.models.LanguageModel(tokenizer, config, name="tuned").eval()
    model.save(tmp_path / "base")
    pv.models.add_task(model, pv.models.TaskConfig("classes", ("soluble", "not")))
    model.save(tmp_path / "run")
    (tmp_path / "new.fasta").write_text(">a\nMKT\n>b\nM1T\n>c\nMKTAYI\n")
    run = [str(tmp_path / "new.fasta"), "-o", str(tmp_path / "out.csv"), "--on-error", "skip"]
    assert main(["predict", str(tmp_path / "run"), *run]) == 0
    table = rows(tmp_path / "out.csv")
    assert [row["name"] for row in table] == ["a", "b", "c"] and table[1]["prediction_soluble"] == "NaN"
    wanted = pv.inference.predict(model, ["MKT", "MKTAYI"])
    for row, values in zip((table[0], table[2]), wanted, strict=True):
        assert [float(row[f"prediction_{name}"]) for name in ("soluble", "not")] == pytest.approx(values, rel=1e-4)
    assert main(["predict", str(tmp_path / "base"), *run]) == 1
    assert "learned no labels" in capsys.readouterr().err
