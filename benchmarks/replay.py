"""Continued pretraining with and without replay of old data: what is forgotten, and what it costs.

    python benchmarks/replay.py NEW.smi [--old OLD.smi] [--steps 300] [--seeds 3]

A tiny Chem-xLSTM is trained on the old molecules (RDKit's NCI set, unless named) and then goes on with the new ones,
alone or with a share of the old, for as many steps in all: replay takes room from the new data. Losses are nats per
token on a tenth of either set that no training saw.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path

import numpy as np
from machine import describe
from processive import chem
from processive.models import LanguageModel
from processive.training import Mixture, TrainingConfig, read_recipe, train

SHARES = (0.0, 0.1, 0.3)  # of the old data


def split(path: Path, most: int, seed: int) -> tuple[list[str], list[str]]:
    """Return the molecules to train on and those held out."""
    texts = sorted({record.text for record in chem.read(path, sanitize=False).usable})
    order = np.random.default_rng(seed).permutation(len(texts))[:most]
    cut = len(order) // 10
    return [texts[i] for i in order[cut:]], [texts[i] for i in order[:cut]]


def loss(model: LanguageModel, texts: list[str]) -> float:
    """Return the mean nats per token."""
    tokens = sum(len(model.tokenizer.encode(text)) - 1 for text in texts)
    return -float(np.sum(chem.score(texts, model))) / tokens


def run(old: Path, new: Path, *, steps: int, most: int, seed: int) -> dict[str, tuple[float, float]]:
    """Return the losses on old and new molecules, before and after each way to go on."""
    (old_texts, old_held), (new_texts, new_held) = split(old, most, seed), split(new, most, seed)
    plan = read_recipe("chem-xlstm", overrides={"training.steps": steps, "training.seed": seed})
    assert plan.training is not None
    model = plan.build(chem.make_tokenizer(plan.tokenizer, []))
    sources = [[model.tokenizer.encode(text) for text in texts] for texts in (new_texts, old_texts)]
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        train(model, sources[1], plan.training, out=out / "old", progress=False)
        found["before"] = loss(model, old_held), loss(model, new_held)
        config = TrainingConfig(**{**vars(plan.training), "learning_rate": plan.training.learning_rate / 2})
        for share in SHARES:
            tuned = copy.deepcopy(model)
            data = Mixture(tuple(sources), (1 - share, share)) if share else sources[0]
            train(tuned, data, config, out=out / f"{share}", progress=False)
            found[f"{share:.0%} old"] = loss(tuned, old_held), loss(tuned, new_held)
    return found


def main() -> None:
    """Print a line for each way to go on: the mean over the seeds, and their standard deviation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("new", type=Path)
    parser.add_argument("--old", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--most", type=int, default=5000, help="molecules of either set")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    print(describe("rdkit"))
    if options.old is None:
        from rdkit import RDConfig

        options.old = Path(RDConfig.RDDataDir) / "NCI" / "first_5K.smi"
    runs = [
        run(options.old, options.new, steps=options.steps, most=options.most, seed=seed)
        for seed in range(options.seeds)
    ]
    print(f"{'':<10} {'old molecules':>17} {'new molecules':>17}")
    for name in runs[0]:
        values = np.array([one[name] for one in runs])
        columns = [f"{mean:.3f} +- {spread:.3f}" for mean, spread in zip(values.mean(0), values.std(0), strict=True)]
        print(f"{name:<10} {columns[0]:>17} {columns[1]:>17}")


if __name__ == "__main__":
    main()
