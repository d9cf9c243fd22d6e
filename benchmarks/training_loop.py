"""What the training loop costs.

    OMP_NUM_THREADS=2 python benchmarks/training_loop.py [--smiles mini_train.zip]

**Overhead.** The time of a step in ``train``, with reading, packing, objectives, clipping, schedule and metrics, beside
that of a bare loop of forward, backward and optimiser step over the same batches, made before the clock starts. The
batches are as big as makes a bare step take about ``--milliseconds``. The two take turns, and the median of the rounds'
ratios counts: the speed of a shared machine changes by the minute. The bar is 5%.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from machine import describe
from numpy.typing import NDArray
from processive import chem
from processive.backbones import TransformerConfig, XLSTMConfig
from processive.kernels import keep_freed_memory
from processive.models import LanguageModel
from processive.sequences import PackedBatch, Tokenizer, tokenizer_from_dict
from processive.training import TrainingConfig, read_metrics, train
from processive.training.data import Pieces
from processive.training.objectives import Objective, causal
from processive.training.optimizer import make_optimizer
from processive.training.step import loss_sum

MOST_OVERHEAD = 0.05
FIRST = 20  # steps of a run that are not counted

Tokens = Sequence[NDArray[np.integer]]


def bare(model: LanguageModel, objectives: Sequence[Objective], config: TrainingConfig) -> float:
    """Seconds of forward, backward and optimiser step over all of ``objectives`` but the first, for each."""
    optimizer = make_optimizer(model, config)
    for number, objective in enumerate(objectives):
        if number == FIRST:
            began = time.perf_counter()
        loss = loss_sum(model, objective) / objective.weight
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return (time.perf_counter() - began) / (len(objectives) - FIRST)


def looped(model: LanguageModel, sequences: Tokens, config: TrainingConfig) -> float:
    """The same of the steps of ``train``, by its own clock."""
    with tempfile.TemporaryDirectory() as out:
        train(model, sequences, config, out=out, progress=False)
        lines = read_metrics(out)
    first = next(line for line in lines if line["step"] == FIRST)
    return float(lines[-1]["seconds"] - first["seconds"]) / (lines[-1]["step"] - FIRST)


def taught(model: LanguageModel, batches: Sequence[PackedBatch]) -> list[Objective]:
    return [causal(batch, model.vocabulary, torch.Generator()) for batch in batches]


def network(tokenizer: Tokenizer, family: str, width: int) -> LanguageModel:
    torch.manual_seed(0)
    size = len(tokenizer.vocabulary)
    config = (
        XLSTMConfig(size, width, 2, heads=4)
        if family == "xlstm"
        else TransformerConfig(size, width, 2, heads=4, direction="causal")
    )
    return LanguageModel(tokenizer, config).train()


def overhead(tokenizer: Tokenizer, sequences: Tokens, *, milliseconds: float, steps: int, rounds: int) -> str:
    """Time the loop beside the bare one; return a line of the table."""

    def plan(tokens: int, count: int) -> tuple[TrainingConfig, list[PackedBatch]]:
        config = TrainingConfig(steps=FIRST + count, batch_tokens=tokens, log_every=FIRST)
        indices = pieces.batches(batch_tokens=tokens, seed=config.seed, epoch=0)[: FIRST + count]
        return config, [pieces.batch(each, vocabulary_size=len(tokenizer.vocabulary)) for each in indices]

    def make() -> LanguageModel:
        return network(tokenizer, "xlstm", 64)

    pieces, tokens = Pieces(sequences), 512
    config, batches = plan(tokens, 30)
    took = bare(make(), taught(make(), batches), config) * 1e3
    tokens = max(64, round(tokens * milliseconds / took))
    config, batches = plan(tokens, steps)
    times = np.array(
        [
            (bare(model := make(), taught(model, batches), config), looped(make(), sequences, config))
            for _ in range(rounds)
        ]
    )
    usual, over = np.median(times, 0), np.median(times[:, 1] / times[:, 0]) - 1
    said = "" if over <= MOST_OVERHEAD else " **short of the aim**"
    each = ", ".join(f"{ratio:+.1%}" for ratio in times[:, 1] / times[:, 0] - 1)
    return f"| {tokens} | {usual[0] * 1e3:.2f} | {usual[1] * 1e3:.2f} | {over:+.1%}{said} | {each} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smiles", type=Path, help="molecules; RDKit's NCI 5K if not given")
    parser.add_argument("--milliseconds", type=float, default=10.0, help="of a bare step")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--most", type=int, help="most molecules")
    options = parser.parse_args()
    if options.smiles is None:
        from rdkit import RDConfig

        options.smiles = Path(RDConfig.RDDataDir) / "NCI" / "first_5K.smi"
    keep_freed_memory()
    smiles = tokenizer_from_dict({"name": "smiles"})
    molecules = [ids for ids in chem.tokenize(chem.read(options.smiles), smiles) if len(ids)][: options.most]
    print(describe("rdkit"))
    print("\n| tokens of a step | bare, ms | loop, ms | overhead | of each round |\n|---|---|---|---|---|")
    many = molecules * (1 + (FIRST + options.steps) * 4096 // sum(map(len, molecules)))
    print(overhead(smiles, many, milliseconds=options.milliseconds, steps=options.steps, rounds=options.rounds))


if __name__ == "__main__":
    main()
