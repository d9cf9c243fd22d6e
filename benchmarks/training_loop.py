"""What the training loop costs.

    OMP_NUM_THREADS=2 python benchmarks/training_loop.py [--smiles mini_train.zip]

**Overhead.** The time of a step in ``train``, with reading, packing, objectives, clipping, schedule and metrics, beside
that of a bare loop of forward, backward and optimiser step over the same batches, made before the clock starts. The
batches are as big as makes a bare step take about ``--milliseconds``. The two take turns, and of each the least time
counts. What another program takes from the processor lengthens the wall-clock time alone, so the processor's time is
told too (with one thread the two are one on a quiet machine). The bar is 5%.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe
from numpy.typing import NDArray
from processive import chem
from processive.backbones import TransformerConfig, XLSTMConfig
from processive.kernels import keep_freed_memory
from processive.models import LanguageModel
from processive.sequences import PackedBatch, Tokenizer, tokenizer_from_dict
from processive.training import TrainingConfig, train
from processive.training.data import Pieces
from processive.training.objectives import Objective, causal
from processive.training.optimizer import make_optimizer
from processive.training.step import loss_sum

MOST_OVERHEAD = 0.05
FIRST = 20  # steps of a run that are not counted

Tokens = Sequence[NDArray[np.integer]]


class Clocked(list[NDArray[np.integer]]):
    """Sequences that know when each was read, by the clock and by the processor's time."""

    def __init__(self, sequences: Tokens) -> None:
        super().__init__(sequences)
        self.times: list[tuple[float, float]] = []

    def __getitem__(self, index: Any) -> Any:
        self.times.append(now())
        return super().__getitem__(index)


def now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def bare(model: LanguageModel, objectives: Sequence[Objective], config: TrainingConfig) -> NDArray[np.float64]:
    """Seconds of forward, backward and optimiser step over all of ``objectives``, and the processor's."""
    optimizer = make_optimizer(model, config)
    began = now()
    for number, objective in enumerate([*objectives[:FIRST], *objectives]):
        if number == min(FIRST, len(objectives)):
            began = now()
        loss = loss_sum(model, objective) / objective.weight
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return np.subtract(now(), began)


def looped(model: LanguageModel, sequences: Tokens, config: TrainingConfig, sizes: list[int]) -> NDArray[np.float64]:
    """The same of each step of ``train`` whose batches hold ``sizes`` sequences, from the first counted to the last."""
    clocked = Clocked(sequences)
    with tempfile.TemporaryDirectory() as out:
        train(model, clocked, config, out=out, progress=False)
    first, last = clocked.times[-sum(sizes[FIRST:])], clocked.times[-sizes[-1]]
    return np.subtract(last, first) / (len(sizes) - 1 - FIRST)


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
        config = TrainingConfig(steps=FIRST + count, batch_tokens=tokens)
        indices = pieces.batches(batch_tokens=tokens, seed=config.seed, epoch=0)[: FIRST + count]
        return config, [pieces.batch(each, vocabulary_size=len(tokenizer.vocabulary)) for each in indices]

    def make() -> LanguageModel:
        return network(tokenizer, "xlstm", 64)

    pieces, tokens = Pieces(sequences), 512
    config, batches = plan(tokens, 10)
    took = bare(make(), taught(make(), batches), config)[1] / len(batches) * 1e3
    tokens = max(64, round(tokens * milliseconds / took))
    config, batches = plan(tokens, steps)
    best = np.full((2, 2), np.inf)
    for _ in range(rounds):
        model = make()
        best[0] = np.minimum(best[0], bare(model, taught(model, batches), config) / len(batches))
        best[1] = np.minimum(best[1], looped(make(), sequences, config, [len(batch) for batch in batches]))
    wall, processor = best[1] / best[0] - 1
    said = "" if wall <= MOST_OVERHEAD else " **short of the aim**"
    milli = " | ".join(f"{value * 1e3:.2f}" for value in (best[0, 0], best[1, 0]))
    return f"| {tokens} | {milli} | {wall:+.1%}{said} | {processor:+.1%} |"


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
    print("\n| tokens of a step | bare, ms | loop, ms | overhead | of the processor's time |\n|---|---|---|---|---|")
    many = molecules * (1 + (FIRST + options.steps) * 4096 // sum(map(len, molecules)))
    print(overhead(smiles, many, milliseconds=options.milliseconds, steps=options.steps, rounds=options.rounds))


if __name__ == "__main__":
    main()
