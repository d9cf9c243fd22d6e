"""Our property predictor beside two random forests, on ESOL and BBBP under scaffold split.

    python benchmarks/properties.py --data ../shared/data/chem/moleculenet

Each seed draws its own split (``chem.scaffold_split``) and starts every model. The forests learn from train; ours
learns from train and stops by valid; test is only reported. Numbers are RMSE (ESOL, log mol/l, less is better) and area
under the ROC curve (BBBP, more is better): mean and standard deviation over the seeds.
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
from machine import describe
from processive.chem.molecules import parse_smiles
from processive.chem.properties import PropertyPredictor
from processive.chem.splits import scaffold_split, write_split
from processive.errors import InputError
from rdkit import rdBase
from rdkit.Chem import Descriptors, rdFingerprintGenerator
from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor
from sklearn.metrics import roc_auc_score

SETS = {
    "esol": ("esol.csv", "measured log solubility in mols per litre", "regression"),
    "bbbp": ("bbbp.csv", "p_np", "classification"),
}


def read_set(folder: Path, name: str) -> tuple[list[str], np.ndarray, str]:
    """Return SMILES, targets and task of one set; rows that are no molecule are left out and counted."""
    file, column, task = SETS[name]
    with (folder / file).open(encoding="utf-8", newline="") as handle:
        rows = [(row["smiles"].strip(), float(row[column])) for row in csv.DictReader(handle)]
    smiles, targets = [], []
    for text, target in rows:
        try:
            parse_smiles(text)
        except InputError:
            continue
        smiles.append(text)
        targets.append(target)
    print(f"\n{name}: {len(smiles)} molecules, {len(rows) - len(smiles)} of {len(rows)} rows are no molecule")
    return smiles, np.array(targets), task


def forest_inputs(smiles: list[str]) -> dict[str, np.ndarray]:
    """Return ECFP4 (Morgan radius 2, 2048 bits) and all RDKit 2D descriptors of each molecule."""
    generator = rdFingerprintGenerator.GetMorganGenerator(radius=2, fpSize=2048)
    molecules = [parse_smiles(text) for text in smiles]
    with rdBase.BlockLogs():
        descriptors = np.array([[function(m) for _, function in Descriptors.descList] for m in molecules])
    return {
        "forest on ECFP4": np.array([generator.GetFingerprintAsNumPy(m) for m in molecules], dtype=np.float32),
        "forest on RDKit 2D": np.clip(np.nan_to_num(descriptors), -1e30, 1e30).astype(np.float32),
    }


def split_hash(split: object, smiles: list[str]) -> str:
    """Return the hash that ``chem.write_split`` gives this split."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "split.json"
        write_split(path, split, smiles)  # type: ignore[arg-type]
        return str(json.loads(path.read_text(encoding="utf-8"))["indices_sha256"])


def measure(task: str, wanted: np.ndarray, got: np.ndarray) -> float:
    if task == "regression":
        return float(np.sqrt(np.mean((wanted - got) ** 2)))
    return float(roc_auc_score(wanted, got))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = Path(__file__).resolve().parents[1]
    parser.add_argument("--data", type=Path, default=here / "../shared/data/chem/moleculenet", help="folder of the csv")
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(5)))
    parser.add_argument("--trees", type=int, default=300)
    parser.add_argument("--ensemble", type=int, default=3, help="networks per predictor")
    arguments = parser.parse_args()
    if not arguments.data.is_dir():
        parser.error(f"{arguments.data} is not a folder; name the one that holds esol.csv and bbbp.csv with --data")
    warnings.filterwarnings("ignore", message=".*no molecule.*")

    print(describe("torch-geometric", "rdkit", "scikit-learn", "numpy"))
    for name in arguments.sets:
        smiles, targets, task = read_set(arguments.data, name)
        inputs = forest_inputs(smiles)
        results: dict[str, list[float]] = {"processive": [], **{forest: [] for forest in inputs}}
        for seed in arguments.seeds:
            split = scaffold_split(smiles, seed=seed)
            train, valid, test = split.train, split.valid, split.test
            predictor = PropertyPredictor(task, ensemble=arguments.ensemble, seed=seed, progress=False)  # type: ignore[arg-type]
            start = time.perf_counter()
            predictor.fit([smiles[i] for i in train], targets[train], ([smiles[i] for i in valid], targets[valid]))
            seconds = time.perf_counter() - start
            held_out = [smiles[i] for i in test]
            got = predictor.predict(held_out) if task == "regression" else predictor.predict_proba(held_out)[:, 1]
            results["processive"].append(measure(task, targets[test], got))
            for forest, x in inputs.items():
                kind = RandomForestRegressor if task == "regression" else RandomForestClassifier
                model = kind(arguments.trees, random_state=seed, n_jobs=1).fit(x[train], targets[train])
                got = model.predict(x[test]) if task == "regression" else model.predict_proba(x[test])[:, 1]
                results[forest].append(measure(task, targets[test], got))
            line = ", ".join(f"{model} {values[-1]:.3f}" for model, values in results.items())
            sizes = f"{len(train)}/{len(valid)}/{len(test)}"
            print(
                f"seed {seed} ({sizes}, split {split_hash(split, smiles)[:16]}): {line} (fit {seconds:.0f} s)",
                flush=True,
            )
        unit = "RMSE" if task == "regression" else "ROC AUC"
        for model, values in results.items():
            spread = np.std(values, ddof=1) if len(values) > 1 else float("nan")
            print(f"{name} {unit:<8} {model:<20} {np.mean(values):.3f} +- {spread:.3f}", flush=True)


if __name__ == "__main__":
    main()
