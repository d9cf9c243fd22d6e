"""Our backbones beside their peers on a CPU: the same weights, one process, the same threads, taken in turn.

    python benchmarks/backbones.py proteins.fasta                   # everything, some ten minutes
    python benchmarks/backbones.py proteins.fasta esm llama xlstm   # some of it
    python benchmarks/backbones.py proteins.fasta esm --share 0.1   # a tenth of the proteins' batches

Peers: fair-esm with its own batching, and transformers. Prints a Markdown table for benchmarks/results.md, and says on
stderr what it is doing. A ratio is the peer's time by ours, so more is better, except where the bar says "at most". The
outputs of each peer are compared with ours before it is timed.

Beside a ratio stands our floor: what the machine, as measured in the same run, could do at most. Decoding reads every
weight and every sequence's cache or memory once per token; the rest is bound by floating-point operations. The share is
what we reach of it.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from machine import describe
from processive.backbones import BackboneState, TransformerConfig, XLSTMConfig
from processive.bio import KmerTokenizer, ProteinTokenizer
from processive.inference import embed
from processive.kernels import chosen_backend, keep_freed_memory, linear
from processive.models import HeadConfig, LanguageModel, load
from processive.sequences import PackedBatch, pack
from torch import Tensor

CLOSE, CLOSE_BF16 = 1e-4, 3e-2  # RMS ratio between our outputs and a peer's
PROMPT = 4096
VOCABULARY = 4128
LONG = 65_536


class Row(NamedTuple):
    """A line of the table; ``bar`` is a lower one unless ``at_most``, and None where there is none."""

    name: str
    ours: str
    peer: str
    ratio: float
    bar: float | None
    floor: str = ""
    share: float | None = None
    at_most: bool = False

    def __str__(self) -> str:
        met = ""
        if self.bar is not None:
            met = "yes" if (self.ratio <= self.bar if self.at_most else self.ratio >= self.bar) else "no"
        bar = "" if self.bar is None else f"{'at most ' if self.at_most else ''}{self.bar:g}"
        share = "" if self.share is None else f"{self.share:.2f}"
        cells = (self.name, self.ours, self.peer, f"**{self.ratio:.2f}**", bar, met, self.floor, share)
        return f"| {' | '.join(cells)} |"


class Machine(NamedTuple):
    """What was measured: reading in byte/s, and products in FLOP/s by the dtype of their operands."""

    reading: float
    products: dict[torch.dtype, float]

    def floor(self, *, flop: float, read: float, dtype: torch.dtype) -> float:
        """Return the fewest seconds that so many operations and bytes read can take."""
        return max(flop / self.products[dtype], read / self.reading)


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure() -> Machine:
    """Measure the machine by a sum of 512 MB, and by our own product of matrices in cache."""
    large = torch.ones(2**27)
    reading = large.nbytes / statistics.median(seconds(large.sum) for _ in range(7))
    x, weight = torch.randn(2048, 1024), torch.randn(2048, 1024)
    products = {}
    for dtype, precision in ((torch.float32, "float32"), (torch.bfloat16, "bf16")):
        times = [seconds(lambda p=precision: linear(x, weight, precision=p)) for _ in range(30)]  # type: ignore[misc]
        products[dtype] = 2 * 2048 * 2048 * 1024 / min(times)
    return Machine(reading, products)


def race(ours: list[Callable[[], object]], peer: Callable[[], object], *, limit: float) -> list[float]:
    """Median seconds of each of ours and then of the peer's, taken in turn: at least 2 rounds, at most 15.

    None is begun after ``limit`` seconds.
    """
    calls = [*ours, peer]
    times: list[list[float]] = [[] for _ in calls]
    start = time.perf_counter()
    while len(times[-1]) < 2 or (len(times[-1]) < 15 and time.perf_counter() - start < limit):
        for call, found in zip(calls, times, strict=True):
            found.append(seconds(call))
    return [statistics.median(found) for found in times]


def check(name: str, got: Tensor, want: Tensor, close: float = CLOSE) -> None:
    """Stop where two networks of the same weights disagree: one of them would be timed for nothing."""
    error = float((got - want).double().square().mean().sqrt() / want.double().square().mean().sqrt())
    print(f"{name}: ours and the peer's differ by {error:.1e}", file=sys.stderr)
    if not error <= close:
        raise SystemExit(f"{name}: ours and the peer's differ by {error:.1e} of their size.")


def narrowed(model: LanguageModel) -> LanguageModel:
    """The model as ``load(dtype=torch.bfloat16)`` reads it: the matrices in bfloat16, the rest in float32."""
    with tempfile.TemporaryDirectory() as folder:
        model.save(folder)
        return load(folder, dtype=torch.bfloat16)


def lively(model: LanguageModel) -> LanguageModel:
    """No parameter at a value that hides a mistake, such as gates with zero weights."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return model.eval()


def weights_read(model: LanguageModel) -> int:
    """Bytes of every weight but the embedding, of which a token reads one row."""
    tensors = [p for name, p in model.named_parameters() if name != "backbone.embedding.weight"]
    return sum(tensor.nbytes for tensor in tensors)


def matrix_flop(model: LanguageModel, *, head: bool) -> int:
    """FLOP of the linear maps per token."""
    return sum(
        2 * p.numel()
        for name, p in model.named_parameters()
        if p.ndim == 2 and name != "backbone.embedding.weight" and (head or not name.startswith("head."))
    )


# ESM-2


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
    from backbone_peers import fair_esm, fair_esm_batches, hf_esm

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


def rate(per_token: float) -> str:
    return f"{1 / per_token:,.0f} tokens/s"


# Language models


def prefill(model: LanguageModel, tokens: Tensor) -> tuple[Tensor, BackboneState]:
    """Logits after the last token, and the state."""
    batch = PackedBatch.from_lengths(tokens, torch.tensor([len(tokens)]))
    hidden, state = model.backbone(batch, return_state=True)
    assert state is not None
    return model.logits(hidden[-1:]), state


def decode(model: LanguageModel, first: Tensor, state: BackboneState, steps: int) -> tuple[Tensor, BackboneState]:
    """Feed ``first``, then the likeliest token, ``steps`` tokens in all; return those found [steps, sequences]."""
    tokens, found = first, []
    for _ in range(steps):
        batch = PackedBatch.one_each(tokens, positions=state.lengths)
        hidden, after = model.backbone(batch, state, return_state=True, reuse_state=True)
        assert after is not None
        state = after
        tokens = model.logits(hidden).argmax(-1)
        found.append(tokens)
    return torch.stack(found), state


def copied(state: BackboneState) -> BackboneState:
    return state.map(torch.clone)


def firsts(sequences: int) -> Tensor:
    """A different last token of the prompt for each sequence."""
    return torch.arange(100, 100 + sequences)


def our_decoding(model: LanguageModel, state: BackboneState, sequences: int, steps: int) -> Callable[[], float]:
    """Return what gives seconds per step after a state; setting up the batch, and its first step, are not counted."""

    @torch.inference_mode()
    def call() -> float:
        _, own = decode(model, firsts(sequences), state.repeat(sequences), 1)
        return seconds(lambda: decode(model, firsts(sequences), own, steps)) / steps

    return call


def turns(calls: list[Callable[[], float]], *, limit: float) -> list[float]:
    """Median of what each call measures, taken in turn, as ``race``."""
    times: list[list[float]] = [[] for _ in calls]
    start = time.perf_counter()
    while len(times[-1]) < 2 or (len(times[-1]) < 9 and time.perf_counter() - start < limit):
        for call, found in zip(calls, times, strict=True):
            found.append(call())
    return [statistics.median(found) for found in times]


def language_model(config: TransformerConfig | XLSTMConfig, head: HeadConfig) -> LanguageModel:
    torch.manual_seed(0)
    model = lively(LanguageModel(KmerTokenizer(n="refuse", tail="refuse"), config, head))
    with torch.no_grad():  # logits of unequal size: the likeliest token is the same in spite of rounding
        model.head.weight[: len(model.vocabulary)] *= torch.linspace(0.5, 2, len(model.vocabulary))[:, None]
    return model


def prompt(length: int) -> Tensor:
    return torch.randint(10, 4000, (length,), generator=torch.Generator().manual_seed(2))


def llama_rows(machine: Machine, arguments: argparse.Namespace) -> Iterator[Row]:
    from backbone_peers import hf_llama
    from transformers import DynamicCache

    width, depth, heads, kv_heads, inner = 768, 12, 12, 4, 2048
    config = TransformerConfig(
        VOCABULARY, width, depth, heads=heads, key_value_heads=kv_heads, feed_forward_width=inner
    )
    model = language_model(config, HeadConfig())
    shape = {"width": width, "depth": depth, "heads": heads, "kv_heads": kv_heads, "inner": inner}
    peer: Any = hf_llama(model.state_dict(), vocabulary=VOCABULARY, **shape)
    narrow = narrowed(model)
    name = f"Llama shape, {model.parameters_count / 1e6:.0f} M"
    tokens = prompt(PROMPT)

    @torch.inference_mode()
    def theirs() -> tuple[Tensor, Any]:
        out = peer(input_ids=tokens[None], use_cache=True, logits_to_keep=1)
        return out.logits[0, :, : len(model.vocabulary)], out.past_key_values

    with torch.inference_mode():
        (logits, state), (their_logits, cache) = prefill(model, tokens), theirs()
        check(f"{name}, prefill", logits, their_logits)
        check(f"{name}, prefill, bf16", prefill(narrow, tokens)[0], their_logits, CLOSE_BF16)
    if "prefill" in arguments.parts:
        ours = [torch.inference_mode()(lambda m=m: prefill(m, tokens)) for m in (model, narrow)]  # type: ignore[misc]
        float32, bf16, peers = race(ours, theirs, limit=arguments.limit)
        flop = matrix_flop(model, head=False) * PROMPT + 4 * width * depth * PROMPT**2 / 2
        for kind, mine, bar, dtype in (("float32", float32, 2, torch.float32), ("bf16", bf16, None, torch.bfloat16)):
            least = machine.floor(flop=flop, read=0, dtype=dtype)
            yield Row(
                f"{name}, prefill {PROMPT:,}, {kind}, beside float32",
                rate(mine / PROMPT), rate(peers / PROMPT), peers / mine, bar, rate(least / PROMPT), least / mine,
            )  # fmt: skip

    def their_decoding(sequences: int, steps: int) -> Callable[[], float]:
        own = copy.deepcopy(cache)
        own.batch_repeat_interleave(sequences)
        ids = torch.cat((tokens.repeat(sequences, 1), firsts(sequences)[:, None]), 1)

        @torch.inference_mode()
        def call() -> float:
            def generate() -> Tensor:
                return peer.generate(
                    ids, attention_mask=torch.ones_like(ids), past_key_values=own, do_sample=False,
                    min_new_tokens=steps, max_new_tokens=steps,
                )  # fmt: skip

            took = seconds(generate) / steps
            own.crop(PROMPT - own.get_seq_length())
            return took

        return call

    assert isinstance(cache, DynamicCache)
    for sequences, steps, bar in ((1, 24, 1.5), (16, 4, 3)):
        if f"decode{sequences}" not in arguments.parts:
            continue
        calls = [our_decoding(m, state, sequences, steps) for m in (model, narrow)]
        with torch.inference_mode():
            ids = torch.cat((tokens, firsts(1)))
            own = copy.deepcopy(cache)
            want = peer.generate(
                ids[None], attention_mask=torch.ones_like(ids)[None], past_key_values=own, do_sample=False,
                min_new_tokens=8, max_new_tokens=8,
            )[0, -8:]  # fmt: skip
            got = decode(model, firsts(1), copied(state), 8)[0][:, 0]
        if not torch.equal(got, want):
            raise SystemExit(f"{name}: ours decodes {got.tolist()}, the peer {want.tolist()}.")
        float32, bf16, peers = turns([*calls, their_decoding(sequences, steps)], limit=arguments.limit)
        cached = 2 * 4 * kv_heads * (width // heads) * depth * (PROMPT + 1) * sequences
        for kind, mine, m, limit in (("float32", float32, model, bar), ("bf16 weights", bf16, narrow, None)):
            flop = matrix_flop(model, head=True) * sequences
            least = machine.floor(flop=flop, read=weights_read(m) + cached, dtype=torch.float32)
            yield Row(
                f"{name}, decoding after {PROMPT:,}, batch {sequences}, {kind}, beside generate in float32",
                rate(mine / sequences), rate(peers / sequences), peers / mine, limit,
                rate(least / sequences), least / mine,
            )  # fmt: skip


def xlstm_rows(machine: Machine, arguments: argparse.Namespace) -> Iterator[Row]:
    from backbone_peers import hf_xlstm

    width, depth, heads = 768, 12, 4
    config = XLSTMConfig(VOCABULARY, width, depth, heads=heads, blocks="mlstm-7b")
    model = language_model(config, HeadConfig(soft_cap=30.0))
    narrow = narrowed(model)
    peer: Any = hf_xlstm(model.state_dict(), vocabulary=VOCABULARY, width=width, depth=depth, heads=heads)
    name = f"xLSTM-7B blocks, {model.parameters_count / 1e6:.0f} M"
    tokens = prompt(PROMPT)

    @torch.inference_mode()
    def theirs() -> tuple[Tensor, Any]:
        out = peer(input_ids=tokens[None], use_cache=True)
        return out.logits[0, -1:, : len(model.vocabulary)], out.cache_params

    with torch.inference_mode():
        (logits, state), (their_logits, cache) = prefill(model, tokens), theirs()
        check(f"{name}, prefill", logits, their_logits)
        check(f"{name}, prefill, bf16", prefill(narrow, tokens)[0], their_logits, CLOSE_BF16)
    memory = heads * (width // 2 // heads) * (width // heads)
    if "prefill" in arguments.parts:
        ours = [torch.inference_mode()(lambda m=m: prefill(m, tokens)) for m in (model, narrow)]  # type: ignore[misc]
        float32, bf16, peers = race(ours, theirs, limit=arguments.limit)
        for kind, mine, bar, dtype in (("float32", float32, 2, torch.float32), ("bf16", bf16, 4, torch.bfloat16)):
            least = machine.floor(flop=matrix_flop(model, head=False) * PROMPT, read=0, dtype=dtype)
            least += machine.floor(flop=4 * memory * depth * PROMPT, read=0, dtype=torch.float32)
            yield Row(
                f"{name}, prefill {PROMPT:,}, {kind}, beside float32",
                rate(mine / PROMPT), rate(peers / PROMPT), peers / mine, bar, rate(least / PROMPT), least / mine,
            )  # fmt: skip

    def their_steps(own: Any, sequences: int, steps: int) -> Tensor:
        ids, found = firsts(sequences)[:, None], []
        for _ in range(steps):
            logits = peer(input_ids=ids, cache_params=own, use_cache=True).logits[:, -1]
            ids = logits[:, : len(model.vocabulary)].argmax(-1)[:, None]
            found.append(ids[:, 0])
        return torch.stack(found)

    def repeated(sequences: int) -> Any:
        own = copy.deepcopy(cache)
        own.rnn_state = {
            layer: tuple(part.repeat_interleave(sequences, 0) for part in parts)
            for layer, parts in own.rnn_state.items()
        }
        return own

    def their_decoding(sequences: int, steps: int) -> Callable[[], float]:
        @torch.inference_mode()
        def call() -> float:
            own = repeated(sequences)
            return seconds(lambda: their_steps(own, sequences, steps)) / steps

        return call

    for sequences, steps, bars in ((1, 24, (1.5, 2.5)), (16, 8, (5, 5))):
        if f"decode{sequences}" not in arguments.parts:
            continue
        with torch.inference_mode():
            got, _ = decode(model, firsts(sequences), state.repeat(sequences), 8)
            want = their_steps(repeated(sequences), sequences, 8)
        if not torch.equal(got, want):
            raise SystemExit(f"{name}: ours decodes {got.tolist()}, the peer {want.tolist()}.")
        calls = [our_decoding(m, state, sequences, steps) for m in (model, narrow)]
        float32, bf16, peers = turns([*calls, their_decoding(sequences, steps)], limit=arguments.limit)
        states = 4 * memory * depth * sequences  # read; what is written as much again is not counted
        for kind, mine, m, bar in (("float32", float32, model, bars[0]), ("bf16 weights", bf16, narrow, bars[1])):
            flop = (matrix_flop(model, head=True) + 6 * memory * depth) * sequences
            least = machine.floor(flop=flop, read=weights_read(m) + states, dtype=torch.float32)
            yield Row(
                f"{name}, decoding after {PROMPT:,}, batch {sequences}, {kind}, beside float32",
                rate(mine / sequences), rate(peers / sequences), peers / mine, bar,
                rate(least / sequences), least / mine,
            )  # fmt: skip
    if "flat" in arguments.parts:
        with torch.inference_mode():
            _, long = prefill(model, prompt(LONG))
        few, many = turns([our_decoding(model, s, 1, 48) for s in (state, long)], limit=arguments.limit)
        yield Row(
            f"{name}, time per decoded token: after {LONG:,} / after {PROMPT:,}",
            f"{many * 1e3:.1f} ms", f"{few * 1e3:.1f} ms", many / few, 1.1, at_most=True,
        )  # fmt: skip


GROUPS = {"esm": esm_rows, "llama": llama_rows, "xlstm": xlstm_rows}
PARTS = ("prefill", "decode1", "decode16", "flat")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("proteins", type=Path, help="a FASTA file")
    parser.add_argument("groups", nargs="*", metavar="group", help=f"any of {', '.join(GROUPS)}; all if not given")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="of llama and xlstm")
    parser.add_argument("--share", type=float, default=1, help="of the proteins' batches")
    parser.add_argument("--limit", type=float, default=30, help="seconds after which a race begins no other round")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    unknown = set(arguments.groups) - set(GROUPS)
    if unknown:
        parser.error(f"there is no {', '.join(sorted(unknown))}; the groups are {', '.join(GROUPS)}")
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    print(describe("fair-esm", "transformers", "xlstm", "numpy"))
    machine = measure()
    peaks = ", ".join(
        f"{str(dtype).split('.')[1]} {flop / 1e9:.0f} GFLOP/s" for dtype, flop in machine.products.items()
    )
    print(f"Measured: reading {machine.reading / 1e9:.1f} GB/s, products {peaks}.")
    backends = [f"{kernel} {chosen_backend(kernel)}" for kernel in ("mlstm", "attention", "linear", "decoding")]
    print(f"Backends in float32: {', '.join(backends)}.\n")
    print("| what | ours | peer | ratio | bar | met | floor | share |\n|---|---|---|---|---|---|---|---|", flush=True)
    for group in arguments.groups or GROUPS:
        print(f"{group} ...", file=sys.stderr)
        for line in GROUPS[group](machine, arguments):
            print(line, flush=True)


if __name__ == "__main__":
    main()
