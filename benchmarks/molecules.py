"""Chem-xLSTM beside a user's own ten lines: a two-layer LSTM with the same tokens, parameters and time.

    python benchmarks/molecules.py --train ../shared/data/chem/chembl31/mini_train.zip \
        --test ../shared/data/chem/chembl31/test.zip --size small --minutes 60

Without ``--train`` it uses RDKit's NCI molecules, the demo's data. Each model trains alone for ``--minutes``, then
samples ``--count`` molecules at temperature 1 without constraints. Printed: parameters, tokens seen, valid, unique (of
valid), novel (of unique), and, with ``--test``, the Frechet ChemNet distance to it (fcd_torch; less is better).

With ``--tokens-per-second`` a run is as long as ``--minutes`` at that speed would make it, counted in tokens: measure
the speeds by a short run on a quiet machine, and the long one may then share it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from machine import describe
from numpy.typing import NDArray
from processive import chem, inference
from processive.sequences import replacing
from processive.training import TrainingConfig, read_recipe, train
from processive.training.batches import epoch_batches
from torch import Tensor, nn

LSTM_RATE, LSTM_BATCH = 3e-3, 64


class PlainLSTM(nn.Module):
    """Embedding, two LSTM layers, a linear map back: what a user writes first."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(width, width, num_layers=2, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(
        self, tokens: Tensor, state: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        hidden, state = self.lstm(self.embedding(tokens), state)
        return self.head(hidden), state


def width_for(parameters: int, vocabulary: int) -> int:
    """Return the width, a multiple of 4, at which the LSTM comes nearest to ``parameters``."""

    def distance(width: int) -> int:
        return abs(2 * width * vocabulary + vocabulary + 16 * width * width + 16 * width - parameters)

    return min(range(16, 2048, 4), key=distance)


def length_sorted_batches(lengths: NDArray[np.int64], rng: np.random.Generator) -> list[NDArray[np.int64]]:
    """Shuffle, sort by length within runs of 20 batches so that little is padding, and shuffle the batches."""
    order = rng.permutation(len(lengths))
    run = 20 * LSTM_BATCH
    runs = [
        order[i : i + run][np.argsort(lengths[order[i : i + run]], kind="stable")] for i in range(0, len(order), run)
    ]
    batches = [group[i : i + LSTM_BATCH] for group in runs for i in range(0, len(group), LSTM_BATCH)]
    return [batches[i] for i in rng.permutation(len(batches))]


def train_lstm(
    sequences: Sequence[NDArray[np.int32]],
    vocabulary: int,
    pad: int,
    width: int,
    *,
    minutes: float,
    most: int | None,
    standing: Path | None,
) -> tuple[PlainLSTM, int]:
    """Train for ``minutes`` or ``most`` tokens with AdamW, warm-up and cosine; return the model and the tokens.

    A run counted in tokens leaves where it stands in ``standing`` after each epoch, and goes on from there.
    """
    torch.manual_seed(0)
    model = PlainLSTM(vocabulary, width)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LSTM_RATE, weight_decay=0.01)
    tensors = [torch.from_numpy(sequence.astype(np.int64)) for sequence in sequences]
    lengths = np.array([len(sequence) for sequence in sequences])
    began, tokens, step, first = time.monotonic(), 0, 0, 0
    if most is not None and standing is not None and standing.exists():
        found = torch.load(standing, weights_only=True)
        model.load_state_dict(found["model"])
        optimizer.load_state_dict(found["optimizer"])
        tokens, step, first = found["tokens"], found["step"], found["epoch"]
    for epoch in itertools.count(first):
        if most is not None and standing is not None:
            states = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            with replacing(standing) as file:
                torch.save({**states, "tokens": tokens, "step": step, "epoch": epoch}, file)
        for batch in length_sorted_batches(lengths, np.random.default_rng([0, epoch])):
            done = (time.monotonic() - began) / (60 * minutes) if most is None else tokens / most
            if done >= 1:
                return model.eval(), tokens
            optimizer.param_groups[0]["lr"] = (
                LSTM_RATE * min(1, (step + 1) / 100) * (0.525 + 0.475 * math.cos(math.pi * done))
            )
            padded = nn.utils.rnn.pad_sequence([tensors[i] for i in batch], batch_first=True, padding_value=pad)
            logits, _ = model(padded[:, :-1])
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), padded[:, 1:].flatten(), ignore_index=pad)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            tokens += int(lengths[batch].sum())
            step += 1
            if step % 200 == 0:
                print(f"  lstm: {done:.0%}, step {step}, loss {loss.item():.3f}", flush=True)
    raise AssertionError  # there is always another epoch


def in_tokens(config: TrainingConfig, sequences: Sequence[NDArray[np.int32]], most: int | None) -> TrainingConfig:
    """Return the configuration that ends after about ``most`` tokens, or as it is without them."""
    if most is None:
        return config
    lengths = np.array([len(sequence) for sequence in sequences])
    steps = len(epoch_batches(lengths, batch_tokens=config.batch_tokens, seed=0, epoch=0))
    return replace(config, minutes=None, steps=round(most * steps / lengths.sum()))


@torch.inference_mode()
def sample_lstm(model: PlainLSTM, decode: Callable[[list[int]], str], *, bos: int, eos: int, count: int) -> list[str]:
    """Sample at temperature 1 until the end token."""
    generator = torch.Generator().manual_seed(0)
    designs: list[str] = []
    for first in range(0, count, 256):
        rows = min(256, count - first)
        tokens, state, written = torch.full((rows, 1), bos), None, []
        for _ in range(256):
            logits, state = model(tokens, state)
            tokens = torch.multinomial(logits[:, -1].softmax(-1), 1, generator=generator)
            written.append(tokens)
        for row in torch.cat(written, 1).tolist():
            designs.append(decode(row[: row.index(eos)] if eos in row else row))
    return designs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, help="molecules to train on; RDKit's NCI 5K if not given")
    parser.add_argument("--test", type=Path, help="held-out molecules for FCD")
    parser.add_argument("--minutes", type=float, default=2.75)
    parser.add_argument(
        "--tokens-per-second", type=float, nargs="+", metavar="RATE", help="of each of --models, to count in tokens"
    )
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--models", nargs="+", default=["chem-xlstm", "lstm"], choices=["chem-xlstm", "lstm"])
    parser.add_argument("--size", default="tiny", help="size of the recipe: tiny, or small for 1.6 million parameters")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of the recipe to change")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--out", type=Path, help="folder for the designs, the numbers and the run, which goes on if stopped"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.train is None:
        from rdkit import RDConfig

        arguments.train = Path(RDConfig.RDDataDir) / "NCI" / "first_5K.smi"
    records = chem.read(arguments.train).checked("skip")
    training = [record.text for record in records.usable]
    overrides = dict(pair.split("=", 1) for pair in arguments.set)
    recipe = read_recipe("chem-xlstm", arguments.size, overrides={**overrides, "training.minutes": arguments.minutes})
    rates = arguments.tokens_per_second or [None] * len(arguments.models)
    most = {
        name: rate and round(60 * arguments.minutes * rate) for name, rate in zip(arguments.models, rates, strict=True)
    }
    tokenizer = chem.make_tokenizer(recipe.tokenizer, records)
    sequences = chem.tokenize(records, tokenizer)
    vocabulary = tokenizer.vocabulary
    ours = recipe.build(tokenizer)
    fcd = None
    if arguments.test is not None:
        from fcd_torch import FCD

        fcd = FCD(device="cpu", n_jobs=1)
        reference = fcd.precalc([record.text for record in chem.read(arguments.test).usable][: arguments.count])
    print(describe("rdkit"))
    print(
        f"{len(training):,} molecules, {sum(map(len, sequences)):,} tokens an epoch, {arguments.minutes:g} minutes each"
    )
    for name in arguments.models:
        if name == "lstm":
            width = width_for(ours.parameters_count, len(vocabulary))
            model, seen = train_lstm(
                sequences,
                len(vocabulary),
                vocabulary.require("pad"),
                width,
                minutes=arguments.minutes,
                most=most["lstm"],
                standing=arguments.out and arguments.out / "lstm.pt",
            )
            parameters = sum(p.numel() for p in model.parameters())
            designs = sample_lstm(
                model,
                tokenizer.decode,
                bos=vocabulary.require("bos"),
                eos=vocabulary.require("eos"),
                count=arguments.count,
            )
        else:
            config = in_tokens(recipe.training, sequences, most[name])
            with tempfile.TemporaryDirectory() as folder:
                run = Path(arguments.out or folder) / "run"
                metrics = train(ours, sequences, config, out=run, resume=True)
            seen, parameters = metrics["tokens"], ours.parameters_count
            designs = inference.generate(ours, arguments.count, max_length=256, seed=0)
        report = chem.report(designs, training)
        row = {
            "model": name,
            "parameters": parameters,
            "tokens": seen,
            "tokens_per_second": round(seen / (60 * arguments.minutes)),
            "valid": report.valid,
            "unique": report.unique,
            "novel": report.novel,
        }
        if fcd is not None:
            row["fcd"] = float(fcd(gen=[s for s in chem.canonical_smiles(designs) if s is not None], pref=reference))
        print(json.dumps(row), flush=True)
        if arguments.out is not None:
            arguments.out.mkdir(parents=True, exist_ok=True)
            (arguments.out / f"{name}.smi").write_text("\n".join(designs) + "\n")
            (arguments.out / f"{name}.json").write_text(json.dumps(row, indent=2))


if __name__ == "__main__":
    main()
