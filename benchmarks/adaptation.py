"""What adaptation is worth with few labels, on shared data: preferences, adapters, averages and ensembles.

    python benchmarks/adaptation.py dpo lora-protein lora-molecule averaging ensembles --data ../shared/data

Each section names its splits and its baselines; a number is a mean and a standard deviation over the seeds. Settings
are chosen on the training labels alone, by folds of positions, and never on what is tested.
"""

from __future__ import annotations

import argparse
import copy
import csv
import io
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import processive as pv
import torch
from Bio import SeqIO
from machine import describe, report
from preferences import LABELS, dpo
from processive import bio, chem
from processive.backbones import TransformerConfig
from processive.inference import predict
from processive.models import (
    AdapterConfig,
    HeadConfig,
    LanguageModel,
    TaskConfig,
    add_adapter,
    add_task,
    load,
    trainable_share,
)
from processive.sequences import PackedBatch
from processive.training import (
    Labelled,
    TrainingConfig,
    average,
    average_runs,
    cluster_folds,
    fit_folds,
    predict_folds,
    read_recipe,
    read_snapshots,
    ties_models,
    train,
)
from scipy.stats import spearmanr

BASE_STEPS = 500  # of the bases but dpo's, which so do not depend on the machine
SMALLER = {"backbone.width": 96, "backbone.depth": 2}  # than the recipe, so that five seeds take minutes


class Solubility:
    """ESOL under scaffold split, and a small Chem-xLSTM that has read some of ChEMBL.

    Attributes:
        smiles: molecules.
        y: their measured log solubility, mol/l.
        base: the language model.
    """

    def __init__(self, data: Path, out: Path) -> None:
        """Read the data, and the model from the folder ``out``; it is trained if it is not there."""
        with (data / "chem/moleculenet/esol.csv").open(encoding="utf-8", newline="") as handle:
            rows = list(csv.DictReader(handle))
        self.smiles = [row["smiles"].strip() for row in rows]
        self.y = np.array([float(row["measured log solubility in mols per litre"]) for row in rows])
        if (out / "config.json").is_file():
            self.base = load(out).eval()
            return
        recipe = read_recipe("chem-xlstm", "tiny", {"training.steps": BASE_STEPS, **SMALLER})
        assert recipe.training is not None
        tokenizer = chem.make_tokenizer(recipe.tokenizer, [])
        with zipfile.ZipFile(data / "chem/chembl31/mini_train.zip") as archive:
            texts = archive.read("mini_train.txt").decode().split()
        self.base = recipe.build(tokenizer)
        train(self.base, [tokenizer.encode(text) for text in texts], recipe.training, out=out, progress=False)
        self.base.eval()

    def part(self, rows: np.ndarray) -> tuple[list[str], np.ndarray]:
        return [self.smiles[row] for row in rows], self.y[rows]

    def split(self, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        found = chem.scaffold_split(self.smiles, seed=seed)
        return np.array(found.train), np.array(found.valid), np.array(found.test)


def error(predicted: np.ndarray, y: np.ndarray) -> float:
    """Root mean square error."""
    return float(np.sqrt(np.mean((predicted - y) ** 2)))


class Structure:
    """Secondary structure of the residues of proteins (FLIP, Dallago et al. 2021): helix, strand, neither.

    Attributes:
        sequences: proteins of at most ``LONGEST`` residues.
        labels: of each residue: 0 neither, 1 strand, 2 helix, NaN unknown; one array for each protein.
        tested: whether it is of the test set, one for each protein.
        base: a masked transformer that has read the proteins that are not tested.
    """

    def __init__(self, data: Path, out: Path) -> None:
        """Read the data, and the model from the folder ``out``; it is trained if it is not there."""
        with zipfile.ZipFile(data / "bio/protein/flip_secondary_structure_splits.zip") as archive:
            files = [archive.read(f"splits/{name}.fasta").decode() for name in ("sequences", "sampled", "mask")]
        texts, structures, masks = ({r.id: r for r in SeqIO.parse(io.StringIO(file), "fasta")} for file in files)
        chosen = [name for name, record in texts.items() if len(record) <= LONGEST]
        self.sequences = [str(texts[name].seq) for name in chosen]
        self.labels = [
            np.where(np.array(list(masks[name].seq)) == "1", ["CEH".index(s) for s in structures[name].seq], np.nan)
            for name in chosen
        ]
        self.tested = np.array(["SET=test" in structures[name].description for name in chosen])
        if (out / "config.json").is_file():
            self.base = load(out).eval()
            return
        tokenizer = bio.ProteinTokenizer()
        config = TransformerConfig(len(tokenizer.vocabulary), 96, 3, heads=4, direction="bidirectional", norm="layer")
        torch.manual_seed(0)
        self.base = LanguageModel(tokenizer, config, HeadConfig(kind="esm"), name="proteins")
        settings = TrainingConfig(objective="masked", steps=2 * BASE_STEPS, batch_tokens=4096, learning_rate=2e-3)
        read = [tokenizer.encode(self.sequences[row]) for row in np.flatnonzero(~self.tested)]
        train(self.base, read, settings, out=out, progress=False)
        self.base.eval()

    def part(self, rows: np.ndarray) -> tuple[list[str], list[np.ndarray]]:
        return [self.sequences[row] for row in rows], [self.labels[row] for row in rows]


LONGEST = 400
TUNING = {"head": 5e-3, "lora": 3e-3, "full": 1e-3}  # learning rates
PROTEIN_EPOCHS, MOLECULE_EPOCHS = 20, 10
TESTED = 200  # proteins


def predictor(base: LanguageModel, tuning: str, *, epochs: int, seed: int, **task: str) -> pv.SequencePredictor:
    config = TrainingConfig(epochs=epochs, batch_tokens=2048, learning_rate=TUNING[tuning], weight_decay=0.01)
    return pv.SequencePredictor(base, tuning=tuning, config=config, adapter=AdapterConfig(rank=8), seed=seed, **task)


def memory(base: LanguageModel, tuning: str, x: Sequence[str]) -> str:
    """Count what one step on the first 4,096 tokens of ``x`` holds, in MB, by what it is."""
    model = copy.deepcopy(base)
    add_task(model, TaskConfig("regression", ("y",)))
    if tuning == "lora":
        add_adapter(model, AdapterConfig(rank=8))
        model.task.requires_grad_(True)
    if tuning == "head":
        model.requires_grad_(False)
        model.task.requires_grad_(True)
    model.head.requires_grad_(False)
    batch = PackedBatch.from_sequences(fitting([model.tokenizer.encode(text) for text in x], 4096))
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        answers = model.task(model.backbone(batch)[0], batch, model.vocabulary)
    kept = sum(saved.values())
    answers.sum().backward()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    parts = [weights / 1e6, trained / 1e6, 2 * trained / 1e6, kept / 1e6]
    words = zip(("weights", "gradients", "Adam", "saved for the backward"), parts, strict=True)
    return f"{sum(parts):.1f} MB: {', '.join(f'{name} {part:.1f}' for name, part in words)}"


def fitting(sequences: Sequence[np.ndarray], tokens: int) -> list[np.ndarray]:
    """The first sequences that hold at most so many tokens together."""
    ends = np.cumsum([len(sequence) for sequence in sequences])
    return list(sequences[: int(np.searchsorted(ends, tokens, side="right"))])


def lora_protein(data: Path, work: Path, seeds: range) -> None:
    """Head, adapter and all weights, on the secondary structure of 200 proteins: accuracy on 200 others."""
    structure = Structure(data, work.parent / "proteins")
    known = np.concatenate(structure.part(np.flatnonzero(structure.tested))[1])
    shares = np.bincount(known[~np.isnan(known)].astype(int)) / np.sum(~np.isnan(known))
    print(
        f"base: {structure.base.parameters_count:,} parameters; of the residues {shares.round(3)} are C, E, H",
        flush=True,
    )

    def tuned(tuning: str, seed: int) -> float:
        rng = np.random.default_rng(seed)
        learned = rng.permutation(np.flatnonzero(~structure.tested))[: LABELS + LABELS // 4]
        tested = rng.permutation(np.flatnonzero(structure.tested))[:TESTED]
        fitted = predictor(structure.base, tuning, epochs=PROTEIN_EPOCHS, seed=seed, kind="classes", level="token")
        fitted.fit(*structure.part(learned[:LABELS]), validation=structure.part(learned[LABELS:]))
        x, y = structure.part(tested)
        found, known = np.concatenate(fitted.predict(x)), np.concatenate(y)
        return float(np.mean(found[~np.isnan(known)] == known[~np.isnan(known)]))

    compare_tunings(tuned, structure.base, structure.sequences, seeds)


def lora_molecule(data: Path, work: Path, seeds: range) -> None:
    """Head, adapter and all weights, on ESOL under scaffold split: root mean square error, less is better."""
    molecules = Solubility(data, work.parent / "molecules")

    def tuned(tuning: str, seed: int) -> float:
        own, valid, tested = molecules.split(seed)
        fitted = predictor(molecules.base, tuning, epochs=MOLECULE_EPOCHS, seed=seed)
        fitted.fit(*molecules.part(own), validation=molecules.part(valid))
        x, y = molecules.part(tested)
        return error(fitted.predict(x), y)

    compare_tunings(tuned, molecules.base, molecules.smiles, seeds)


def compare_tunings(tuned: Callable[[str, int], float], base: LanguageModel, x: Sequence[str], seeds: range) -> None:
    """Print what ``tuned`` gives for each tuning and seed, and what a step on ``x`` trains and holds."""
    columns: dict[str, list[float]] = {}
    for seed in seeds:
        start = time.perf_counter()
        line = {tuning: tuned(tuning, seed) for tuning in TUNING}
        for name, value in line.items():
            columns.setdefault(name, []).append(value)
        numbers = ", ".join(f"{value:.3f}" for value in line.values())
        print(f"seed {seed}: {numbers}; {time.perf_counter() - start:.0f} s", flush=True)
    report(columns)
    for tuning in TUNING:
        print(
            f"{tuning:4} trains {trained_share(base, tuning):7.2%}; a step holds {memory(base, tuning, x)}", flush=True
        )


def trained_share(base: LanguageModel, tuning: str) -> float:
    """Share of all parameters that is trained."""
    model = copy.deepcopy(base)
    model.requires_grad_(tuning == "full")
    model.head.requires_grad_(False)
    if tuning == "lora":
        add_adapter(model, AdapterConfig(rank=8))
    add_task(model, TaskConfig("regression", ("y",)))
    return trainable_share(model)


def averaging(data: Path, work: Path, seeds: range) -> None:
    """RMSE on ESOL: a run, its last checkpoints averaged, three runs with one head averaged, and merged by TIES."""
    molecules = Solubility(data, work.parent / "molecules")
    columns: dict[str, list[float]] = {}
    for seed in seeds:
        own, _, tested = molecules.split(seed)
        x, y = molecules.part(tested)
        labelled = Labelled.encode(molecules.base.tokenizer, *molecules.part(own))
        start = copy.deepcopy(molecules.base)
        add_task(start, labelled.task("solubility"), seed=seed)
        runs, singles, smooth = [], [], []
        for run in range(3):
            model, out = copy.deepcopy(start), work / f"{seed}-{run}"
            config = TrainingConfig(
                steps=120, batch_tokens=2048, learning_rate=1e-3, weight_decay=0.01, seed=run, snapshot_every=15
            )
            train(model, labelled, config, out=out, progress=False)
            singles.append(tested_error(model.eval(), model.state_dict(), x, y))
            last = [weights for _, weights in sorted(read_snapshots(out).items())][-3:]
            smooth.append(tested_error(model, {**model.state_dict(), **average(last)}, x, y))
            runs.append(out)
        together = average_runs(runs).state_dict()
        merged = ties_models(start.state_dict(), [load(run).state_dict() for run in runs], density=0.5)
        line = {
            "a run": float(np.mean(singles)),
            "its last 3 checkpoints averaged": float(np.mean(smooth)),
            "3 runs averaged": tested_error(model, together, x, y),
            "3 runs merged by TIES": tested_error(model, merged, x, y),
        }
        for name, value in line.items():
            columns.setdefault(name, []).append(value)
        print(f"seed {seed}: {', '.join(f'{value:.3f}' for value in line.values())}", flush=True)
    report(columns)


def tested_error(model: LanguageModel, weights: Mapping[str, torch.Tensor], x: Sequence[str], y: np.ndarray) -> float:
    """Root mean square error with other weights in a copy of the model."""
    other = copy.deepcopy(model)
    other.load_state_dict(dict(weights))
    return error(predict(other.eval(), x), y)


def ensembles(data: Path, work: Path, seeds: range) -> None:
    """ESOL: five members, each without one fold of scaffolds; their mean, and whether they disagree where they err."""
    molecules = Solubility(data, work.parent / "molecules")
    columns: dict[str, list[float]] = {}
    for seed in seeds:
        own, valid, tested = molecules.split(seed)
        rows = np.concatenate((own, valid))
        (texts, labels), (x, y) = molecules.part(rows), molecules.part(tested)
        folds = cluster_folds(chem.scaffold_groups(texts), 5, seed=seed)
        members = fit_folds(
            lambda fold: predictor(molecules.base, "full", epochs=MOLECULE_EPOCHS, seed=fold), texts, labels, folds
        )
        together = predict_folds(members, x)
        line = {
            "RMSE of a member": float(np.mean([error(np.asarray(member.predict(x)), y) for member in members])),
            "RMSE of the ensemble": error(together.mean, y),
            "Spearman of disagreement and error": float(spearmanr(together.deviation, np.abs(together.mean - y))[0]),
        }
        for name, value in line.items():
            columns.setdefault(name, []).append(value)
        print(f"seed {seed}: {', '.join(f'{value:.3f}' for value in line.values())}", flush=True)
    report(columns)


SECTIONS = {
    "dpo": dpo,
    "lora-protein": lora_protein,
    "lora-molecule": lora_molecule,
    "averaging": averaging,
    "ensembles": ensembles,
}


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []], default=list(SECTIONS))
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0, help="Settings were found on seeds 0 to 4; try others.")
    parser.add_argument("--work", type=Path, help="New folder for bases and runs; a base that is there is not trained.")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    print(describe("scikit-learn", "scipy"))
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    with tempfile.TemporaryDirectory() as folder:
        work = options.work or Path(folder)
        for name in options.sections:
            print(f"\n== {name}: {SECTIONS[name].__doc__}", flush=True)
            SECTIONS[name](options.data, work / name, seeds)


if __name__ == "__main__":
    main(sys.argv[1:])
