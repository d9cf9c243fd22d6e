"""The main job: real molecules, cells, proteins and genes in; designs, maps, embeddings and scores out.

Run by ``make demo``. Everything it reads ships with the dependencies or stands beside this file; everything it writes
goes to one folder. Each part is what a user would write, so it can be copied from.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import processive as pv
from processive import bio, cells, chem
from processive.training import read_recipe, train

HERE = Path(__file__).parent
PARTS = ("molecules", "cells", "sequences")
TOY_MINUTES = 0.25  # of training on a handful of sequences


def molecules(out: Path, epochs: int | None, count: int) -> None:
    """Pretrain a small Chem-xLSTM on RDKit's NCI molecules, generate new ones, and map the known ones."""
    from rdkit import RDConfig

    records = chem.read(Path(RDConfig.RDDataDir) / "NCI" / "first_5K.smi").checked("skip")
    training = [record.text for record in records.usable]
    recipe = read_recipe("chem-xlstm", overrides={} if epochs is None else {"training.epochs": epochs})
    tokenizer = chem.make_tokenizer(recipe.tokenizer, records)
    print(f"\nMolecules: training {recipe.name} on {len(training):,} molecules, {recipe.training.epochs} times")
    train(recipe.build(tokenizer), chem.tokenize(records, tokenizer), recipe.training, out=out / "chem")

    model = pv.load(out / "chem")
    designs = model.generate(count, seed=0, progress=True)
    report = chem.report(designs, training)
    print(report)
    valid = list(dict.fromkeys(smiles for smiles in chem.canonical_smiles(designs) if smiles is not None))
    chem.write_smiles(out / "molecules.smi", valid)
    chem.draw_molecules(out / "molecules.png", valid[:24])
    chem.draw_properties(out / "properties.png", {"generated": report.generated, "training set": report.reference})
    chem.draw_map(
        out / "chemical_space.png",
        model.embed(training, progress=True),
        chem.property_table(training)["logP"],
        title="NCI molecules in the model's hidden states",
    )


def single_cells(out: Path) -> None:
    """Train a small cell encoder on scanpy's blood cells, embed them, and draw their UMAP."""
    import scanpy as sc

    adata = sc.datasets.pbmc68k_reduced()
    recipe = read_recipe("cell-encoder")
    tokenizer = cells.make_tokenizer(recipe.tokenizer, adata)
    print(f"\nCells: training {recipe.name} on {adata.n_obs} cells")
    train(recipe.build(tokenizer), cells.tokenize(adata, tokenizer), recipe.training, out=out / "cells")

    model = pv.load(out / "cells")
    cells.embed(adata, model, progress=True)
    key = f"X_{model.name}"
    cells.draw_umap(adata, out / "cells_umap.png", use_rep=key, color="bulk_labels")
    cells.write_h5ad(out / "cells.h5ad", adata)


def sequences(out: Path) -> None:
    """Score and embed well-known proteins and their genes, with toy models trained on just those few sequences."""
    for name, file in (("protein-encoder", "proteins.fasta"), ("dna-xlstm", "genes.fasta")):
        recipe = read_recipe(name, overrides={"training.minutes": TOY_MINUTES})
        records = bio.read(HERE / file, alphabet="dna" if name.startswith("dna") else "protein").checked("raise")
        tokenizer = bio.make_tokenizer(recipe.tokenizer, records)
        print(f"\nSequences: {name} on {file}, {len(records)} records, for {60 * TOY_MINUTES:g} seconds")
        train(recipe.build(tokenizer), bio.tokenize(records, tokenizer), recipe.training, out=out / name)
        model = pv.load(out / name)
        scores = bio.score(records, model)
        embeddings = bio.embed(records, model)
        for record, score in zip(records, scores, strict=True):
            print(f"  {record.name:<28}{len(record.text):>6} letters{score / len(record.text):>9.3f} nats per letter")
        print(f"  embeddings {embeddings.shape}")


def main() -> None:
    """Run the parts and say what was written."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for everything that is written")
    parser.add_argument("--epochs", type=int, help="passes over the molecules; the recipe's if not given")
    parser.add_argument("--count", type=int, default=1000, help="molecules to generate")
    parser.add_argument("--only", choices=PARTS, action="append", help="run only this part (may be repeated)")
    arguments = parser.parse_args()
    out = arguments.out
    wanted = arguments.only or PARTS
    if "molecules" in wanted:
        molecules(out, arguments.epochs, arguments.count)
    if "cells" in wanted:
        single_cells(out)
    if "sequences" in wanted:
        sequences(out)
    print(f"\nWritten to {out}/:")
    for path in sorted(path for path in out.iterdir() if not path.name.startswith(".")):
        print(f"  {path.name}{'/' if path.is_dir() else ''}")
    print(
        "\nNext: open the pictures and cells.h5ad; generate more with"
        f"\n  processive generate {out}/chem -n 1000 -o designs.smi"
        "\ntrain on your own input with"
        "\n  processive train chem-xlstm molecules.smi --out runs/chem"
        "\nand read tutorials/."
    )


if __name__ == "__main__":
    main()
