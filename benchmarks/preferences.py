"""Preferences on an assay: DPO on few labels of a deep mutational scan; a section of benchmarks/adaptation.py."""

from __future__ import annotations

import copy
import csv
import time
from pathlib import Path

import numpy as np
import torch
from machine import report
from processive import bio
from processive.backbones import TransformerConfig
from processive.inference import embed
from processive.models import (
    HeadConfig,
    LanguageModel,
    load,
)
from processive.training import (
    Preferences,
    TrainingConfig,
    cluster_folds,
    read_snapshots,
    train,
)
from scipy.stats import spearmanr
from sklearn.linear_model import RidgeCV

FIRST = 24  # number of the first residue of the alignment's query
LABELS = 200
TEST_SHARE = 0.2  # of the positions
BASE_MINUTES = 2.0  # of dpo's base


class Assay:
    """The beta-lactamase table, and the family it belongs to.

    Attributes:
        wild: the sequence that variants are named on.
        names: variants, ``A42G``.
        activity: fitness at 2,500 ug/ml ampicillin, log10 of the enrichment against the wild type; more is better.
        positions: of the variants.
        family: rows of the alignment, gaps as letters, so that a column has one position.
    """

    def __init__(self, data: Path) -> None:
        with (data / "bio/dms/BLAT_ECOLX_Ranganathan2015_labeled.csv").open(encoding="utf-8", newline="") as handle:
            rows = list(csv.DictReader(handle))
        self.names = np.array([row["mutant"] for row in rows])
        self.activity = np.array([float(row["2500"]) for row in rows])
        self.positions = np.array([int(name[1:-1]) for name in self.names])
        aligned = [record.text.upper().replace(".", "-") for record in bio.read(data / "bio/msa/BLAT_ECOLX.a2m")]
        self.wild, self.family = aligned[0], list(dict.fromkeys(aligned))

    def split(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Return ``LABELS`` variants to learn from, and all variants at other positions."""
        rng = np.random.default_rng(seed)
        places = rng.permutation(np.unique(self.positions))
        tested = np.isin(self.positions, places[: round(TEST_SHARE * len(places))])
        return rng.permutation(np.flatnonzero(~tested))[:LABELS], np.flatnonzero(tested)

    def sequences(self, rows: np.ndarray) -> list[str]:
        return [bio.apply_variant(self.wild, name, first=FIRST) for name in self.names[rows]]

    def scores(self, model: LanguageModel, rows: np.ndarray, method: str = "wild-type-marginal") -> np.ndarray:
        return bio.score_variants(self.wild, list(self.names[rows]), model, method=method, first=FIRST)

    def spearman(self, scores: np.ndarray, rows: np.ndarray) -> float:
        return float(spearmanr(scores, self.activity[rows])[0])


def family_model(assay: Assay, out: Path, *, minutes: float) -> LanguageModel:
    """Train a masked transformer of 0.4 million parameters on the alignment, if it is not in the folder ``out``."""
    if (out / "config.json").is_file():
        return load(out).eval()
    tokenizer = bio.ProteinTokenizer()
    config = TransformerConfig(
        len(tokenizer.vocabulary),
        128,
        2,
        heads=4,
        direction="bidirectional",
        norm="layer",
        activation="gelu",
        bias=True,
        positions="absolute",
        max_positions=len(assay.wild) + 2,
    )
    torch.manual_seed(0)
    model = LanguageModel(tokenizer, config, HeadConfig(kind="esm"), name="family")
    settings = TrainingConfig(
        objective="masked",
        minutes=minutes,
        batch_tokens=4096,
        learning_rate=2e-3,
        beta2=0.98,
        weight_decay=0.01,
    )
    train(model, [tokenizer.encode(row) for row in assay.family], settings, out=out, progress=False)
    return model.eval()


def preferring(
    base: LanguageModel, assay: Assay, rows: np.ndarray, out: Path, *, beta: float, steps: int, seed: int
) -> LanguageModel:
    """Tune a copy of ``base`` by DPO on the activity of ``rows``."""
    model = copy.deepcopy(base)
    data = Preferences.encode(
        model.tokenizer, assay.sequences(rows), assay.activity[rows], gap=0.3, beta=beta, wild_type=assay.wild
    ).with_reference(model)
    settings = TrainingConfig(
        steps=steps,
        batch_tokens=LABELS * (len(assay.wild) + 2),  # all of them in one batch, which reads the wild type once
        learning_rate=1e-4,
        weight_decay=0.01,
        floor=1.0,
        seed=seed,
        snapshot_every=EVERY,
        log_every=steps,
    )
    train(model, data, settings, out=out, progress=False)
    return model.eval()


BETAS = (0.3, 1.0, 3.0)
STEPS, EVERY = 80, 20


def chosen_settings(base: LanguageModel, assay: Assay, rows: np.ndarray, seed: int, work: Path) -> tuple[float, int]:
    """Choose beta and the number of steps by five folds of the positions among the labels."""
    folds = cluster_folds(assay.positions[rows].tolist(), 5, seed=seed)
    found: dict[tuple[float, int], np.ndarray] = {}
    for beta in BETAS:
        for fold in range(5):
            out = work / f"{seed}-{beta}-{fold}"
            model = preferring(base, assay, rows[folds != fold], out, beta=beta, steps=STEPS, seed=seed)
            for step, weights in read_snapshots(out).items():
                model.load_state_dict({**model.state_dict(), **weights})
                scores = found.setdefault((beta, step), np.zeros(len(rows)))
                scores[folds == fold] = assay.scores(model, rows[folds == fold])
    return max(found, key=lambda setting: assay.spearman(found[setting], rows))


def ridge(base: LanguageModel, assay: Assay, rows: np.ndarray, test: np.ndarray, *, with_score: bool) -> float:
    """Ridge regression on mean embeddings, its strength by leave-one-out; perhaps beside the zero-shot score."""
    parts = []
    for chosen in (rows, test):
        x = embed(base, assay.sequences(chosen)).astype(np.float64)
        parts.append(np.column_stack((x, assay.scores(base, chosen))) if with_score else x)
    mean, spread = parts[0].mean(0), parts[0].std(0) + 1e-12
    fit = RidgeCV(np.logspace(-2, 6, 33)).fit((parts[0] - mean) / spread, assay.activity[rows])
    return assay.spearman(fit.predict((parts[1] - mean) / spread), test)


def dpo(data: Path, work: Path, seeds: range) -> None:
    """Spearman on variants at positions without labels: before and after DPO on 200 labels, and ridge beside it."""
    assay = Assay(data)
    start = time.perf_counter()
    base = family_model(assay, work / "family", minutes=BASE_MINUTES)
    everything = np.arange(len(assay.names))
    print(
        f"base: {base.parameters_count:,} parameters, {time.perf_counter() - start:.0f} s on {len(assay.family)} rows"
    )
    for method in ("masked-marginal", "wild-type-marginal"):
        found = assay.spearman(assay.scores(base, everything, method), everything)
        print(f"zero-shot, all {len(everything)} variants, {method}: {found:.3f}", flush=True)
    columns: dict[str, list[float]] = {}
    for seed in seeds:
        start = time.perf_counter()
        rows, test = assay.split(seed)
        beta, steps = chosen_settings(base, assay, rows, seed, work)
        tuned = preferring(base, assay, rows, work / f"{seed}-chosen", beta=beta, steps=steps, seed=seed)
        line = {
            "zero-shot, masked marginal": assay.spearman(assay.scores(base, test, "masked-marginal"), test),
            "zero-shot, wild-type marginal": assay.spearman(assay.scores(base, test), test),
            "DPO, wild-type marginal": assay.spearman(assay.scores(tuned, test), test),
            "ridge on embeddings": ridge(base, assay, rows, test, with_score=False),
            "ridge on embeddings and zero-shot score": ridge(base, assay, rows, test, with_score=True),
        }
        for name, value in line.items():
            columns.setdefault(name, []).append(value)
        numbers = ", ".join(f"{value:.3f}" for value in line.values())
        took = time.perf_counter() - start
        print(f"seed {seed}: {numbers}; beta {beta}, {steps} steps, {len(test)} variants, {took:.0f} s", flush=True)
    report(columns)
    best = np.maximum(columns["zero-shot, masked marginal"], columns["zero-shot, wild-type marginal"])
    gain = np.array(columns["DPO, wild-type marginal"]) - best
    each = ", ".join(f"{value:+.3f}" for value in gain)
    print(f"gain of DPO over the better zero-shot score: {gain.mean():+.3f} ({each})")
