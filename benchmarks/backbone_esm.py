"""ESM-2 beside fair-esm and transformers: mean embeddings of natural proteins; a group of benchmarks/backbones.py."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from backbone_peers import fair_esm, fair_esm_batches, hf_esm
from backbone_race import CLOSE_BF16, Machine, Row, check, lively, matrix_flop, narrowed, rate, seconds
from processive.backbones import TransformerConfig
from processive.bio import ProteinTokenizer
from processive.inference import embed
from processive.models import HeadConfig, LanguageModel
from processive.sequences import pack
from torch import Tensor


class Proteins(NamedTuple):
    """Sequences by the labels of their records."""

    fasta: Path
    sequences: dict[str, str]

    @property
    def tokens(self) -> dict[str, int]:
        """Tokens of each with begin and end."""
        return {label: len(sequence) + 2 for label, sequence in self.sequences.items()}


def read_proteins(fasta: Path) -> Proteins:
    from esm import FastaBatchedDataset

    dataset = FastaBatchedDataset.from_file(fasta)
    return Proteins(fasta, dict(zip(dataset.sequence_labels, dataset.sequence_strs, strict=True)))


def in_turn(kinds: list[tuple[list[Any], list[int], Callable[[Any], object]]]) -> list[float]:
    """Seconds per token of each kind's batches, each kind going on where it is the farthest behind."""
    spent, done, at = [0.0] * len(kinds), [0] * len(kinds), [0] * len(kinds)
    while any(at[i] < len(kind[0]) for i, kind in enumerate(kinds)):
        share = [done[i] / sum(kind[1]) if at[i] < len(kind[0]) else 2 for i, kind in enumerate(kinds)]
        i = share.index(min(share))
        batches, tokens, call = kinds[i]
        spent[i] += seconds(lambda: call(batches[at[i]]))  # noqa: B023 - called at once
        done[i] += tokens[at[i]]
        at[i] += 1
    return [s / d for s, d in zip(spent, done, strict=True)]


def esm_rows(machine: Machine, arguments: argparse.Namespace) -> Iterator[Row]:
    """Mean embeddings of the last layer. fair-esm makes logits too, which it does at each call."""
    proteins = read_proteins(arguments.proteins)
    theirs = fair_esm_batches(proteins.fasta, 4096)
    labels = list(proteins.sequences)
    ours = [[labels[i] for i in group] for group in pack([proteins.tokens[label] for label in labels], 8192)]
    every = max(1, round(1 / arguments.share))
    theirs, ours = theirs[every // 2 :: every], ours[every // 2 :: every]
    their_tokens = [sum(proteins.tokens[label] for label in batch[0]) for batch in theirs]
    our_tokens = [sum(proteins.tokens[label] for label in batch) for batch in ours]
    for size, depth, width, heads in (("8M", 6, 320, 20), ("35M", 12, 480, 20)):
        torch.manual_seed(0)
        config = TransformerConfig(
            33, width, depth, heads=heads, direction="bidirectional", norm="layer", activation="gelu", bias=True,
            token_dropout=32,
        )  # fmt: skip
        model = lively(LanguageModel(ProteinTokenizer(), config, HeadConfig("esm")))
        narrow = narrowed(model)
        shape = {"depth": depth, "width": width, "heads": heads}
        fair, hugging = fair_esm(model.state_dict(), **shape), hf_esm(model.state_dict(), **shape)

        @torch.inference_mode()
        def by_fair(batch: tuple[list[str], Tensor], fair: Any = fair, depth: int = depth) -> Tensor:
            hidden = fair(batch[1], repr_layers=[depth])["representations"][depth]
            lengths = [len(proteins.sequences[label]) for label in batch[0]]
            return torch.stack([hidden[i, 1 : length + 1].mean(0) for i, length in enumerate(lengths)])

        @torch.inference_mode()
        def by_hugging(batch: tuple[list[str], Tensor], hugging: Any = hugging) -> Tensor:
            mask = (batch[1] != 1).long()
            hidden = hugging(input_ids=batch[1], attention_mask=mask).last_hidden_state
            lengths = [len(proteins.sequences[label]) for label in batch[0]]
            return torch.stack([hidden[i, 1 : length + 1].mean(0) for i, length in enumerate(lengths)])

        def by_ours(batch: list[str], model: LanguageModel = model) -> Tensor:
            return torch.from_numpy(embed(model, [proteins.sequences[label] for label in batch]))

        some = theirs[len(theirs) // 2]
        want = by_fair(some)
        check(f"ESM-2 {size}, transformers", by_hugging(some), want)
        check(f"ESM-2 {size}", by_ours(some[0]), want)
        check(f"ESM-2 {size}, bf16", by_ours(some[0], narrow), want, CLOSE_BF16)
        kinds: list[tuple[list[Any], list[int], Callable[[Any], object]]] = [
            (ours, our_tokens, by_ours),
            (ours, our_tokens, lambda batch, narrow=narrow: by_ours(batch, narrow)),
            (theirs, their_tokens, by_fair),
            (theirs, their_tokens, by_hugging),
        ]
        float32, bf16, fair_time, hugging_time = in_turn(kinds)
        pairs = sum(proteins.tokens[label] ** 2 for batch in ours for label in batch)
        flop = matrix_flop(model, head=False) + 4 * width * depth * pairs / sum(our_tokens)
        for name, mine, peer, peer_name, bar, dtype in (
            ("float32", float32, fair_time, "fair-esm", 2.5, torch.float32),
            ("bf16", bf16, fair_time, "fair-esm", 5, torch.bfloat16),
            ("float32", float32, hugging_time, "transformers", None, torch.float32),
            ("bf16", bf16, hugging_time, "transformers", None, torch.bfloat16),
        ):
            least = machine.floor(flop=flop, read=0, dtype=dtype)
            yield Row(
                f"ESM-2 {size}, {sum(map(len, ours))} proteins, {name}, beside {peer_name} in float32",
                rate(mine), rate(peer), peer / mine, bar, rate(least), least / mine,
            )  # fmt: skip
