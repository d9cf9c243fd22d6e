"""What packing saves: an epoch of packed batches beside one of padded batches.

    python benchmarks/packing.py [--smiles mini_train.zip] [--fasta QUERY.fasta] [--processor]

An epoch of the same data through the same network, forward, backward and optimiser step, as packed batches and as
padded ones: as many sequences as fill the batch on average, shuffled, sorted by length within runs of ``RUN`` batches,
each batch padded to its longest. A padded batch is run as sequences of one length, the padding being a part of each,
which is the work of a padded tensor but for the logits of padding, which are left out. The three take turns, and of
each the least time counts. Told are tokens of the data per second, padding not counted. The bar is 1.3 times.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe
from numpy.typing import NDArray
from processive import bio, chem
from processive.kernels import keep_freed_memory
from processive.models import LanguageModel
from processive.sequences import PackedBatch, Tokenizer, tokenizer_from_dict
from processive.training import TrainingConfig
from processive.training.data import Pieces
from processive.training.objectives import Objective
from processive.training.optimizer import make_optimizer
from processive.training.step import loss_sum
from training_loop import network, taught

RUN = 20  # batches sorted by length together, as most loaders that bucket by length do
FIRST = 2  # batches that are taken once before the clock starts

Tokens = Sequence[NDArray[np.integer]]


def epoch(model: LanguageModel, objectives: Sequence[Objective], *, processor: bool) -> float:
    """Seconds of forward, backward and optimiser step over all of ``objectives``, by the clock or the processor's."""
    now = time.process_time if processor else time.perf_counter
    optimizer, began = make_optimizer(model, TrainingConfig(steps=1)), 0.0
    for number, objective in enumerate([*objectives[:FIRST], *objectives]):
        if number == min(FIRST, len(objectives)):
            began = now()
        loss = loss_sum(model, objective) / objective.weight
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return now() - began


def padded(sequences: Tokens, pad: int, each: int, *, ordered: bool) -> list[PackedBatch]:
    """Batches of ``each`` sequences, padded to the longest, in shuffled order, sorted within runs or not."""
    rng = np.random.default_rng(0)
    order, lengths = rng.permutation(len(sequences)), np.array([len(sequence) for sequence in sequences])
    if ordered:
        runs = np.split(order, range(RUN * each, len(order), RUN * each))
        order = np.concatenate([run[np.argsort(lengths[run], kind="stable")] for run in runs])
    found = []
    for group in np.split(order, range(each, len(order), each)):
        longest = lengths[group].max()
        found.append(
            PackedBatch.from_sequences(
                [np.pad(sequences[i], (0, longest - lengths[i]), constant_values=pad) for i in group]
            )
        )
    return found


def packing(
    name: str, tokenizer: Tokenizer, sequences: Tokens, *, batch_tokens: int, rounds: int, processor: bool
) -> Iterator[str]:
    """Time an epoch of each way to make batches; yield lines of the table."""
    total, pad = sum(map(len, sequences)), tokenizer.vocabulary.require("pad")
    each = max(1, round(batch_tokens / (total / len(sequences))))
    pieces = Pieces(sequences)
    ways = {
        "packed": [
            pieces.batch(indices, vocabulary_size=len(tokenizer.vocabulary))
            for indices in pieces.batches(batch_tokens=batch_tokens, seed=0, epoch=0)
        ],
        "padded, sorted": padded(sequences, pad, each, ordered=True),
        "padded": padded(sequences, pad, each, ordered=False),
    }
    for family in ("xlstm", "transformer"):
        best = dict.fromkeys(ways, float("inf"))
        for _ in range(rounds):
            for way, batches in ways.items():
                model = network(tokenizer, family, 128)
                seconds = epoch(model, taught(model, batches), processor=processor)
                best[way] = min(best[way], seconds)
        for way, batches in ways.items():
            read = sum(len(batch.tokens) for batch in batches)
            ratio = "" if way == "packed" else f"{best[way] / best['packed']:.2f}"
            row: list[Any] = [name, family, way, len(batches), f"{1 - total / read:.1%}", f"{total / best[way]:,.0f}"]
            yield "| " + " | ".join(map(str, [*row, ratio])) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smiles", type=Path, help="molecules; left out if not given")
    parser.add_argument("--fasta", type=Path, help="proteins; left out if not given")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-tokens", type=int, default=8192, help="of a packed batch")
    parser.add_argument("--most", type=int, help="most sequences of each file")
    parser.add_argument("--processor", action="store_true", help="by the processor's time, for a busy machine")
    options = parser.parse_args()
    keep_freed_memory()
    print(describe("rdkit"))
    print("\n| data | network | batches | number | padding | tokens/s | packed is faster by |\n" + "|---" * 7 + "|")
    smiles, protein = (tokenizer_from_dict({"name": name}) for name in ("smiles", "protein"))
    data = []
    if options.smiles is not None:
        data.append(("molecules", smiles, chem.tokenize(chem.read(options.smiles), smiles)))
    if options.fasta is not None:
        data.append(("proteins", protein, bio.tokenize(bio.read(options.fasta, protein), protein)))
    for name, tokenizer, found in data:
        sequences = [ids for ids in found if len(ids)][: options.most]
        lines = packing(
            name,
            tokenizer,
            sequences,
            batch_tokens=options.batch_tokens,
            rounds=options.rounds,
            processor=options.processor,
        )
        for line in lines:
            print(line, flush=True)


if __name__ == "__main__":
    main()
