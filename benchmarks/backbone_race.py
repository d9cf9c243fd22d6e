"""What the groups of benchmarks/backbones.py share: rows of its table, floors, races, and reading language models."""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from processive.backbones import BackboneState, TransformerConfig, XLSTMConfig
from processive.bio import KmerTokenizer
from processive.kernels import linear
from processive.models import HeadConfig, LanguageModel, load
from processive.sequences import PackedBatch
from torch import Tensor

CLOSE, CLOSE_BF16 = 1e-4, 3e-2  # RMS ratio between our outputs and a peer's
PROMPT = 4096
VOCABULARY = 4128


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


def rate(per_token: float) -> str:
    return f"{1 / per_token:,.0f} tokens/s"


# Language models


class Both(NamedTuple):
    """A language model in float32, and with its matrices in bfloat16."""

    name: str
    float32: LanguageModel
    bf16: LanguageModel


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


def language_model(name: str, config: TransformerConfig | XLSTMConfig, head: HeadConfig) -> Both:
    torch.manual_seed(0)
    model = lively(LanguageModel(KmerTokenizer(n="refuse", tail="refuse"), config, head))
    with torch.no_grad():  # logits of unequal size: the likeliest token is the same in spite of rounding
        model.head.weight[: len(model.vocabulary)] *= torch.linspace(0.5, 2, len(model.vocabulary))[:, None]
    return Both(f"{name}, {model.parameters_count / 1e6:.0f} M", model, narrowed(model))


def prompt(length: int) -> Tensor:
    return torch.randint(10, 4000, (length,), generator=torch.Generator().manual_seed(2))


@torch.inference_mode()
def checked_prefill(models: Both, tokens: Tensor, wanted: Tensor) -> BackboneState:
    """Return the state after a prompt, once the logits there are close to the peer's."""
    logits, state = prefill(models.float32, tokens)
    check(f"{models.name}, prefill", logits, wanted)
    check(f"{models.name}, prefill, bf16", prefill(models.bf16, tokens)[0], wanted, CLOSE_BF16)
    return state


def prefill_rows(
    models: Both,
    tokens: Tensor,
    theirs: Callable[[], object],
    *,
    bars: tuple[float | None, float | None],
    floor: Callable[[torch.dtype], float],
    limit: float,
) -> Iterator[Row]:
    """Prefill beside the peer's in float32; ``floor`` gives the fewest seconds it can take."""
    ours = [torch.inference_mode()(lambda m=m: prefill(m, tokens)) for m in models[1:]]  # type: ignore[misc]
    *times, peer = race(ours, theirs, limit=limit)
    length = len(tokens)
    for kind, mine, bar, dtype in zip(("float32", "bf16"), times, bars, (torch.float32, torch.bfloat16), strict=True):
        least = floor(dtype)
        yield Row(
            f"{models.name}, prefill {length:,}, {kind}, beside float32",
            rate(mine / length), rate(peer / length), peer / mine, bar, rate(least / length), least / mine,
        )  # fmt: skip


def check_decoded(name: str, got: Tensor, want: Tensor) -> None:
    """Stop where ours and the peer's tokens are not the same."""
    if not torch.equal(got, want):
        raise SystemExit(f"{name}: ours decodes {got.tolist()}, the peer {want.tolist()}.")


def decoding_rows(
    machine: Machine,
    models: Both,
    state: BackboneState,
    theirs: Callable[[], float],
    *,
    sequences: int,
    steps: int,
    bars: tuple[float | None, float | None],
    flop: float,
    read: float,
    beside: str,
    limit: float,
) -> Iterator[Row]:
    """Decoding beside the peer's; a step of all sequences takes ``flop`` and reads the weights and ``read`` bytes."""
    *times, peer = turns([*(our_decoding(m, state, sequences, steps) for m in models[1:]), theirs], limit=limit)
    for kind, mine, bar, model in zip(("float32", "bf16 weights"), times, bars, models[1:], strict=True):
        least = machine.floor(flop=flop, read=weights_read(model) + read, dtype=torch.float32)
        yield Row(
            f"{models.name}, decoding after {PROMPT:,}, batch {sequences}, {kind}, beside {beside}",
            rate(mine / sequences), rate(peer / sequences), peer / mine, bar,
            rate(least / sequences), least / mine,
        )  # fmt: skip
