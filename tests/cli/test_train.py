"""`train` and `tokenize` on small data: what they write, what goes on from it, and what is refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import processive as pv
import pytest
import torch
from processive.cli import main
from processive.sequences import TokenStore


def test_train_writes_a_card(chem_model: Path, inputs: Path) -> None:
    card = pv.load(chem_model).card
    assert card.data["file"] == "molecules.smi"
    assert card.data["sha256"] == hashlib.sha256((inputs / "molecules.smi").read_bytes()).hexdigest()
    assert (card.data["records"], card.data["unusable"]) == (8, 0)
    assert card.recipe["name"] == "chem-xlstm"
    assert card.metrics["step"] == 3
    assert pv.load(chem_model).name == "chem"


def test_train_again_into_the_same_folder_is_refused(
    chem_model: Path, inputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (chem_model / "model.safetensors").read_bytes()
    assert main(["train", "chem-xlstm", str(inputs / "molecules.smi"), "--out", str(chem_model), "--steps", "1"]) == 1
    assert "--resume" in capsys.readouterr().err
    assert (chem_model / "model.safetensors").read_bytes() == before


def test_train_is_reproducible_and_takes_validation(inputs: Path, tmp_path: Path) -> None:
    molecules = str(inputs / "molecules.smi")
    small = ["--set", "backbone.width=16", "--set", "backbone.depth=1", "--set", "backbone.heads=2", "--epochs", "2"]
    for out in ("a", "b"):
        arguments = ["train", "chem-xlstm", molecules, "--out", str(tmp_path / out), "--seed", "7", *small]
        assert main([*arguments, "--validation", molecules]) == 0
    first, second = pv.load(tmp_path / "a"), pv.load(tmp_path / "b")
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))
    assert first.card.metrics["validation_loss"] > 0
    assert first.card.data["validation"]["records"] == 8


def test_a_detector_has_its_head_from_a_recipe_and_beside_a_base(
    protein_model: Path, inputs: Path, tmp_path: Path
) -> None:
    train = ["train", "protein-encoder", str(inputs / "proteins.fasta"), "--steps", "1"]
    train += ["--set", "training.objective=replaced"]
    small = ["--set", "backbone.width=16", "--set", "backbone.depth=1", "--set", "backbone.heads=2"]
    assert pv.load(protein_model).task_config is None
    assert main([*train, *small, "--out", str(tmp_path / "new")]) == 0
    assert main([*train, "--base", str(protein_model), "--out", str(tmp_path / "tuned")]) == 0
    for name in ("new", "tuned"):
        found = pv.load(tmp_path / name).task_config
        assert found is not None and (found.names, found.level) == (("replaced",), "token")


def test_train_goes_on_from_a_base_whole_in_its_head_and_beside_it(
    chem_model: Path, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = ["train", "chem-xlstm", str(inputs / "molecules.smi"), "--base", str(chem_model), "--steps", "3"]
    base = pv.load(chem_model).state_dict()
    for adapt, frozen in (("full", 0), ("head", len(base) - 1)):
        assert main([*train, "--out", str(tmp_path / adapt), "--adapt", adapt]) == 0
        tuned = pv.load(tmp_path / adapt)
        assert sum(torch.equal(base[name], tensor) for name, tensor in tuned.state_dict().items()) == frozen
        assert tuned.card.recipe["base"] == str(chem_model) and "adapt" not in tuned.card.recipe
    capsys.readouterr()
    lora = ["--adapt", "lora", "--set", "adapt.rank=2", "--set", "training.learning_rate=0.1"]
    assert main([*train, "--out", str(tmp_path / "lora"), *lora]) == 0
    said = capsys.readouterr().out
    assert "Trained " in said and f"adapter='{tmp_path / 'lora'}'" in said
    adapted, plain = pv.load(chem_model, adapter=tmp_path / "lora"), pv.load(chem_model)
    assert adapted.score(["CCO"])[0] != plain.score(["CCO"])[0]
    assert len(adapted.generate(2, max_length=5)) == 2
    saved = json.loads((tmp_path / "lora" / "adapter.json").read_text())
    assert saved["card"]["recipe"]["adapt"]["rank"] == 2 and saved["card"]["data"]["records"] == 8


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["chem-xlsm", "x.smi"], "no recipe 'chem-xlsm'"),
        (["chem-xlstm", "x.smi", "--set", "depth=3"], "no setting 'depth'"),
        (["chem-xlstm", "x.smi", "--set", "backbone.dept=3"], "dept"),
        (["chem-xlstm", "x.smi", "--set", "backbone.depth"], "has no '='"),
        (["chem-xlstm", "x.smi", "--size", "huge"], "no size 'huge'"),
        (["chem-xlstm", "x.smi", "--steps", "0"], "steps must be positive"),
        (["chem-xlstm", "x.smi", "--target", "logS"], "no --target"),
        (["chem-xlstm", "x.smi", "--adapt", "lora"], "needs a model to start from: --base MODEL"),
        (["chem-xlstm", "x.smi", "--set", "adapt.rank=0"], "rank and alpha are positive"),
        (["molecule-property", "x.csv"], "--target"),
        (["chem-xlstm", "x.smi", "--device", "abacus"], "'abacus' cannot be used here"),
    ],
)
def test_train_refuses_what_cannot_work_before_reading(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *arguments, "--out", str(tmp_path / "run")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert not (tmp_path / "run").exists()


def test_tokenize_and_train_from_stores(
    inputs: Path, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.smi"
    bad.write_text("CCO\nC!\nCCN amine\n")
    new, old = tmp_path / "new.store", tmp_path / "old.store"
    molecules = str(inputs / "molecules.smi")
    one = ["--recipe", "chem-xlstm", "--workers", "1"]
    assert main(["tokenize", molecules, str(bad), "--out", str(new), *one]) == 1
    assert "record 2" in capsys.readouterr().err and not new.exists()
    assert main(["tokenize", molecules, str(bad), "--out", str(new), *one, "--on-error", "skip"]) == 0
    said = capsys.readouterr()
    assert "10 sequences" in said.out and "1 records left out" in said.out and "bad.smi record 2" in said.err
    assert main(["tokenize", molecules, "--out", str(old), "--tokenizer", "smiles", "--workers", "1"]) == 0
    small = ["--set", "backbone.width=16", "--set", "backbone.depth=1", "--set", "backbone.heads=2", "--steps", "3"]
    out = tmp_path / "run"
    mixed = ["--mix", f"{old}=0.5", "--validation", str(old)]
    assert main(["train", "chem-xlstm", str(new), "--out", str(out), *small, *mixed]) == 0
    card = pv.load(out).card
    assert [file["file"] for file in card.data["inputs"]] == ["molecules.smi", "bad.smi"]
    assert (card.data["records"], card.data["unusable"]) == (11, 1)
    assert card.data["mix"][0]["weight"] == 0.5 and card.data["validation"]["store"] == "old.store"
    capsys.readouterr()
    assert main(["train", "dna-xlstm", str(new), "--out", str(tmp_path / "dna"), "--steps", "1"]) == 1
    assert "another tokenizer (smiles)" in capsys.readouterr().err
    assert main(["train", "chem-xlstm", str(new), "--out", str(tmp_path / "x"), "--mix", f"{old}"]) == 1
    assert "DATA=WEIGHT" in capsys.readouterr().err


def test_tokenize_with_the_tokenizer_of_a_run(protein_model: Path, inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "store"
    arguments = ["tokenize", str(inputs / "proteins.fasta"), "--tokenizer", str(protein_model), "--out", str(out)]
    assert main([*arguments, "--workers", "1"]) == 0
    store = TokenStore(out)
    tokenizer = pv.load(protein_model).tokenizer
    assert [tokenizer.decode(ids.tolist()) for ids in store] == ["MKTAYIAKQR", "GSHMLEDPVA", "MVLSPADKTNVKAAW"]


def test_tokenize_cells(cells: Path, tmp_path: Path) -> None:
    from processive import cells as room

    out = tmp_path / "store"
    arguments = ["tokenize", str(cells), "--recipe", "cell-encoder", "--out", str(out), "--on-error", "skip"]
    assert main([*arguments, "--workers", "1"]) == 0
    adata = room.read(cells)
    wanted = [cell for cell in room.tokenize(adata, room.make_tokenizer({}, adata)) if len(cell)]
    assert [cell.tolist() for cell in TokenStore(out)] == [cell.tolist() for cell in wanted]
    assert (out / "unusable.tsv").read_text().split("\t")[1:3] == ["3", "cell2"]
    small = ["--set", "backbone.width=16", "--set", "backbone.depth=1", "--set", "backbone.heads=2", "--steps", "2"]
    assert main(["train", "cell-encoder", str(out), "--out", str(tmp_path / "run"), *small]) == 0
