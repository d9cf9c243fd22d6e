"""Our kernels beside their peers from PyPI on a CPU: one process, the same inputs and threads, taken in turn.

    python benchmarks/kernels.py                  # everything, some minutes
    python benchmarks/kernels.py mlstm attention  # some of: mlstm slstm decode train attention memory
    python benchmarks/kernels.py --threads 1

Prints a Markdown table for benchmarks/results.md, and says on stderr what it is doing. A figure is the median over
rounds in which ours and the peer's alternate; the ratio is peer's time / our time, so more is better, except where the
bar says "at most". Before a kernel is timed its outputs are compared with the peer's, and the gradients where the
peer's are right (``native_autograd``; ``native_custbw`` is not the gradient of its forward).
"""

from __future__ import annotations

import argparse
import copy
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from machine import describe
from processive.backbones import XLSTMConfig
from processive.chem import SmilesTokenizer
from processive.kernels import attention, chosen_backend, mlstm, slstm
from processive.models import LanguageModel, load
from processive.sequences import PackedBatch
from torch import Tensor, nn

CLOSE = 1e-3  # RMS ratio between our outputs and a peer's
BATCH = 32  # sequences of a padded batch
RESIDENT = 1e6 if sys.platform == "darwin" else 1e3  # ru_maxrss is in bytes there, in kilobytes elsewhere; to MB


class Row(NamedTuple):
    """A line of the table; ``bar`` is a lower one unless ``at_most``, and None where there is none."""

    name: str
    ours: str
    peer: str
    ratio: float | int
    bar: float | int | None
    at_most: bool = False

    def __str__(self) -> str:
        start = f"| {self.name} | {self.ours} | {self.peer} | **{self.ratio:.2f}**"
        if self.bar is None:
            return f"{start} | | |"
        met = self.ratio <= self.bar if self.at_most else self.ratio >= self.bar
        return f"{start} | {'at most ' if self.at_most else ''}{self.bar:g} | {'yes' if met else 'no'} |"


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def race(ours: Callable[[], object], peer: Callable[[], object], *, limit: float = 4.0) -> tuple[float, float]:
    """Median seconds of both, taken in turn: at least 2 rounds, at most 15, none begun after ``limit`` seconds."""
    ours(), peer()
    mine: list[float] = []
    theirs: list[float] = []
    start = time.perf_counter()
    while len(theirs) < 2 or (len(theirs) < 15 and time.perf_counter() - start < limit):
        mine += [seconds(ours), seconds(ours)]
        theirs.append(seconds(peer))
    return statistics.median(mine), statistics.median(theirs)


def row(name: str, tokens: int, times: tuple[float, float], bar: float | None) -> Row:
    ours, peer = times
    return Row(name, f"{tokens / ours:,.0f} tokens/s", f"{tokens / peer:,.0f} tokens/s", peer / ours, bar)


def check(name: str, got: Tensor, want: Tensor) -> None:
    """Stop where two implementations of the same formula disagree: one of them would be timed for nothing."""
    error = float((got - want).detach().double().square().mean().sqrt() / want.detach().double().square().mean().sqrt())
    if not error <= CLOSE:
        raise SystemExit(f"{name}: ours and the peer's differ by {error:.1e} of their size.")


def backward(forward: Callable[[], Tensor], leaves: list[Tensor], upstream: Tensor) -> Callable[[], list[Tensor]]:
    """Return forward and backward as one call; ``upstream`` is the gradient of the output."""
    return lambda: list(torch.autograd.grad(forward(), leaves, upstream))


def edges(lengths: Tensor) -> Tensor:
    return F.pad(lengths.cumsum(0), (1, 0))


def short_lengths() -> Tensor:
    return torch.randint(20, 121, (512,), generator=torch.Generator().manual_seed(0))


# mLSTM


def mlstm_inputs(tokens: int) -> list[Tensor]:
    """Four heads, qk 64, v 128; forget gates as a fresh model has them."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(tokens, 4, dim) for dim in (64, 64, 128))
    return [x.requires_grad_() for x in (q, k, v, torch.randn(tokens, 4), torch.randn(tokens, 4) + torch.tensor(4.0))]


def mlstm_rows() -> Iterator[Row]:
    from peers import mlstm_kernel

    tokens = 16_384
    inputs = mlstm_inputs(tokens)
    upstream = torch.randn(tokens, 4, 128)
    theirs, leaves = mlstm_kernel("native_custbw", inputs)
    exact, exact_leaves = mlstm_kernel("native_autograd", inputs)
    for kernel in (theirs, exact):
        check("mLSTM", mlstm(*inputs), kernel())

    @torch.no_grad()
    def forward() -> Tensor:
        return mlstm(*inputs)

    yield row("mLSTM forward, 16,384 tokens, beside native_custbw", tokens, race(forward, torch.no_grad()(theirs)), 2)
    both = backward(lambda: mlstm(*inputs), inputs, upstream)
    times = race(both, backward(theirs, leaves, upstream))
    yield row("mLSTM forward+backward, beside native_custbw (inexact)", tokens, times, 3)
    full = backward(exact, exact_leaves, upstream)
    for mine, his in zip(both(), full(), strict=True):
        check("mLSTM gradient", mine, his[0].transpose(0, 1))
    yield row("mLSTM forward+backward, beside native_autograd (exact)", tokens, race(both, full), 25)

    short, long = mlstm_inputs(4096), mlstm_inputs(131_072)
    calls = [backward(lambda x=x: mlstm(*x), x, torch.randn(len(x[0]), 4, 128)) for x in (short, long)]
    few, many = race(*calls)
    few, many = few / 4096 * 1e6, many / 131_072 * 1e6
    yield Row(
        "mLSTM forward+backward, time per token: 131,072 / 4,096 tokens",
        f"{many:.2f} us",
        f"{few:.2f} us",
        many / few,
        1.15,
        at_most=True,
    )
    yield from packed_mlstm_rows()


def packed_mlstm_rows() -> Iterator[Row]:
    """512 short sequences in one call, beside batches padded to their longest: of our own kernel, and of the peer's."""
    lengths = short_lengths()
    tokens = int(lengths.sum())
    inputs = mlstm_inputs(tokens)
    packed = backward(lambda: mlstm(*inputs, cu_seqlens=edges(lengths)), inputs, torch.randn(tokens, 4, 128))
    for kind, order, bar in (("length-sorted", lengths.argsort(), 1.3), ("arrival-order", torch.arange(512), 3)):
        longest = lengths[order].view(-1, BATCH).amax(1).tolist()
        for whose, padded in (("the same kernel", padded_mlstm), ("native_custbw", padded_peer)):
            calls = [padded(length) for length in longest]
            times = race(packed, lambda calls=calls: [call() for call in calls])
            name = f"mLSTM forward+backward, 512 packed sequences of 20-120, beside {whose} on {kind} padded batches"
            yield row(f"{name} of {BATCH}", tokens, times, bar)


def padded_mlstm(longest: int) -> Callable[[], list[Tensor]]:
    inputs, cu_seqlens = mlstm_inputs(BATCH * longest), edges(torch.full((BATCH,), longest))
    upstream = torch.randn(BATCH * longest, 4, 128)
    return backward(lambda: mlstm(*inputs, cu_seqlens=cu_seqlens), inputs, upstream)


def padded_peer(longest: int) -> Callable[[], list[Tensor]]:
    """Padded on to whole chunks, which is all that the peer's kernel takes in training."""
    from peers import CHUNK, mlstm_kernel

    length = -(-longest // CHUNK) * CHUNK
    forward, leaves = mlstm_kernel("native_custbw", mlstm_inputs(BATCH * length), sequences=BATCH)
    return backward(forward, leaves, torch.randn(BATCH * length, 4, 128))


# sLSTM


def slstm_rows() -> Iterator[Row]:
    from peers import slstm_cell

    sequences, length, heads, head_dim = 8, 1024, 4, 64
    tokens = sequences * length
    torch.manual_seed(0)
    gates = torch.randn(tokens, 4, heads, head_dim, requires_grad=True)
    recurrent = (torch.randn(4, heads, head_dim, head_dim) / head_dim**0.5).requires_grad_()
    cu_seqlens = torch.arange(0, tokens + 1, length)
    theirs, leaves = slstm_cell(gates, recurrent, sequences)

    def ours() -> Tensor:
        return slstm(gates, recurrent, cu_seqlens=cu_seqlens)

    forward, their_forward = torch.no_grad()(ours), torch.no_grad()(theirs)
    check("sLSTM", forward(), their_forward())
    yield row("sLSTM forward, 8 x 1,024, beside vanilla", tokens, race(forward, their_forward), 10)
    upstream = torch.randn(tokens, heads, head_dim)
    times = race(backward(ours, [gates, recurrent], upstream), backward(theirs, leaves, upstream))
    yield row("sLSTM forward+backward, beside vanilla", tokens, times, 50)


# Chem-xLSTM, 14.8 million parameters


def both_models() -> tuple[LanguageModel, nn.Module]:
    from peers import xlstm_model

    torch.manual_seed(0)
    tokenizer = SmilesTokenizer()
    size = len(tokenizer.vocabulary)
    ours = LanguageModel(tokenizer, XLSTMConfig(size, width=512, depth=9, heads=8))
    theirs = xlstm_model(size, width=512, depth=9, heads=8, context=128)
    counts = [sum(p.numel() for p in model.parameters()) for model in (ours, theirs)]
    if counts[0] != counts[1]:
        raise SystemExit(f"The models differ: {counts[0]:,} and {counts[1]:,} parameters.")
    return ours, theirs


def narrowed(model: LanguageModel) -> LanguageModel:
    """The model as ``load(dtype=torch.bfloat16)`` reads it: the matrices in bfloat16, the rest in float32."""
    with tempfile.TemporaryDirectory() as folder:
        model.save(folder)
        return load(folder, dtype=torch.bfloat16)


def our_steps(model: LanguageModel, sequences: int, steps: int) -> Callable[[], object]:
    """Decode ``steps`` tokens for each sequence, feeding the likeliest one back."""
    start = PackedBatch.from_lengths(torch.zeros(sequences, dtype=torch.int64), torch.ones(sequences).long())

    @torch.inference_mode()
    def call() -> None:
        logits, state = model(start, return_state=True)
        for _ in range(steps - 1):
            batch = PackedBatch.one_each(logits.argmax(-1), positions=state.lengths)
            hidden, state = model.backbone(batch, state, return_state=True, reuse_state=True)
            logits = model.logits(hidden)

    return call


def their_steps(model: nn.Module, sequences: int, steps: int) -> Callable[[], object]:
    @torch.inference_mode()
    def call() -> None:
        logits, state = model.step(torch.zeros(sequences, 1, dtype=torch.int64), None)
        for _ in range(steps - 1):
            logits, state = model.step(logits.argmax(-1), state)

    return call


def decode_rows() -> Iterator[Row]:
    """Our bf16 form has bfloat16 matrices and float32 states; the peer's is all bfloat16."""
    ours, theirs = both_models()
    ours.eval(), theirs.eval()
    narrow, their_narrow = narrowed(ours), copy.deepcopy(theirs).to(torch.bfloat16)
    for sequences, steps, bars in ((1, 48, (2, 4)), (64, 8, (10, None))):
        tokens = sequences * steps
        mine, mine16 = our_steps(ours, sequences, steps), our_steps(narrow, sequences, steps)
        his, his16 = their_steps(theirs, sequences, steps), their_steps(their_narrow, sequences, steps)
        name = f"decoding, 14.8 M Chem-xLSTM, batch {sequences}"
        yield row(f"{name}, float32", tokens, race(mine, his, limit=8), bars[0])
        yield row(f"{name}, bf16 weights, beside float32", tokens, race(mine16, his, limit=8), bars[1])
        yield row(f"{name}, bf16 weights, beside bf16", tokens, race(mine16, his16, limit=8), None)


def training_step(model: nn.Module, forward: Callable[[], Tensor], targets: Tensor, bf16: bool) -> Callable[[], object]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def call() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = F.cross_entropy(forward().float(), targets)
        loss.backward()
        optimizer.step()

    return call


def train_rows() -> Iterator[Row]:
    sequences, length = 32, 100
    tokens = sequences * length
    name = "training step with AdamW, 14.8 M Chem-xLSTM, 32 x 100"
    for mine, his, bar in (("float32", "float32", 3), ("bf16", "float32", 6), ("bf16", "bf16", None)):
        ours, theirs = both_models()
        ids = torch.randint(0, len(ours.vocabulary), (sequences, length))
        batch, targets = PackedBatch.from_sequences(list(ids)), ids.roll(-1, 1).flatten()
        times = race(
            training_step(ours, lambda m=ours, b=batch: m(b)[0], targets, mine == "bf16"),
            training_step(theirs, lambda m=theirs, i=ids: m(i).flatten(0, 1), targets, his == "bf16"),
            limit=20,
        )
        yield row(f"{name}, {mine}, beside {his}", tokens, times, bar)


# Attention


def attention_rows() -> Iterator[Row]:
    from peers import sdpa

    for name, lengths, causal, bar in (
        ("attention, 1 sequence of 4,096, causal", torch.tensor([4096]), True, 0.95),
        ("attention, 512 packed sequences of 20-120, causal, beside padded SDPA", short_lengths(), True, 3),
        ("attention, 512 packed sequences of 20-120, both ways, beside masked SDPA", short_lengths(), False, 3),
    ):
        torch.manual_seed(0)
        tokens = int(lengths.sum())
        inputs = [torch.randn(tokens, 8, 64, requires_grad=True) for _ in range(3)]
        cu_seqlens = edges(lengths)

        def ours(inputs: list[Tensor] = inputs, cu: Tensor = cu_seqlens, causal: bool = causal) -> Tensor:
            return attention(*inputs, cu_seqlens=cu, causal=causal)

        theirs, leaves, real = sdpa(inputs, lengths, causal=causal)
        check(name, ours(), real(theirs()))
        forward = race(torch.no_grad()(ours), torch.no_grad()(theirs))
        yield row(f"{name}, forward", tokens, forward, bar)
        upstream = torch.randn_like(theirs())
        mine, peer = backward(ours, inputs, real(upstream).clone()), backward(theirs, leaves, upstream)
        yield row(f"{name}, forward+backward", tokens, race(mine, peer), bar)


# Memory, each in a process of its own


def use_memory(what: str) -> None:
    """Run in a fresh process: do it, and print the process's largest resident memory in MB and the seconds it took."""
    start = time.perf_counter()
    if what == "backward":
        inputs = mlstm_inputs(262_144)
        torch.autograd.grad(mlstm(*inputs).sum(), inputs)
    else:
        state = None
        with torch.no_grad():
            for _ in range(4_194_304 // 65_536):
                _, state = mlstm(*mlstm_inputs(65_536), initial_state=state, return_state=True)
    print(peak_megabytes(), time.perf_counter() - start)


def peak_megabytes() -> float:
    """Largest resident memory of this process; Linux counts in ``ru_maxrss`` what the parent held before."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(next(line for line in status.read_text().splitlines() if line.startswith("VmHWM")).split()[1]) / 1e3
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / RESIDENT


def memory_rows() -> Iterator[Row]:
    for what, name, bar in (
        ("backward", "mLSTM forward+backward of 262,144 tokens, peak resident memory, GB", 6),
        ("stream", "mLSTM forward of 4,194,304 tokens in pieces of 65,536, peak resident memory, GB", 1.5),
    ):
        command = [sys.executable, __file__, "--use-memory", what, "--threads", str(torch.get_num_threads())]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        peak, took = (float(x) for x in out.split())
        yield Row(name, f"{peak:,.0f} MB in {took:.0f} s", "", peak / 1e3, bar, at_most=True)


GROUPS = {
    "mlstm": mlstm_rows,
    "slstm": slstm_rows,
    "decode": decode_rows,
    "train": train_rows,
    "attention": attention_rows,
    "memory": memory_rows,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", metavar="group", help=f"any of {', '.join(GROUPS)}; all if not given")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--use-memory", choices=["backward", "stream"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    unknown = set(arguments.groups) - set(GROUPS)
    if unknown:
        parser.error(f"there is no {', '.join(sorted(unknown))}; the groups are {', '.join(GROUPS)}")
    torch.set_num_threads(arguments.threads)
    if arguments.use_memory:
        use_memory(arguments.use_memory)
        return
    print(describe("xlstm", "mlstm_kernels", "numpy"))
    backends = [f"{kernel} {chosen_backend(kernel)}" for kernel in ("mlstm", "slstm", "attention", "causal_conv1d")]
    print(f"Backends in float32: {', '.join(backends)}.\n")
    print("| what | ours | peer | ratio | bar | met |\n|---|---|---|---|---|---|", flush=True)
    for group in arguments.groups or GROUPS:
        print(f"{group} ...", file=sys.stderr)
        for line in GROUPS[group]():
            print(line, flush=True)


if __name__ == "__main__":
    main()
