"""Run networks and kernels on a batch that processes share, and compare with one process that has it whole.

One of the processes that test_sequence_parallel.py starts: ``<rank> <processes> <folder>``. It writes to the folder, as
``<rank>.json``, by how much each case was off.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
import torch.distributed as dist
from conftest import CASES, Case
from processive.backbones import AnyConfig
from processive.backbones.sequence_parallel import gather_tokens, share_of_heads, with_all_tokens, with_neighbours
from processive.kernels import attention, causal_conv1d, mlstm, slstm
from processive.models import HeadConfig, LanguageModel
from processive.sequences import IdTokenizer, PackedBatch, share_batch
from processive.training import share_objective, sum_gradients
from processive.training.objectives import Objective, causal
from processive.training.step import loss_sum
from torch import Tensor

# Lengths of the sequences, and by number of processes how their tokens are shared: None is equally.
LAYOUTS = {
    "equal": ([5, 1, 9, 1, 4], {2: None, 4: None}),  # a boundary in the middle of a sequence
    "uneven": ([7, 3, 6], {2: (0, 2, 16), 4: (0, 1, 2, 9, 16)}),  # fewer tokens than a convolution looks back
    "nothing at first": ([6, 0, 5], {2: (0, 0, 11), 4: (0, 0, 5, 5, 11)}),
    "nothing at last": ([1, 9, 1], {2: (0, 11, 11), 4: (0, 4, 5, 11, 11)}),
    "one sequence": ([13], {2: (0, 12, 13), 4: (0, 4, 5, 6, 13)}),
    "between sequences": ([4, 6], {2: (0, 4, 10), 4: (0, 4, 6, 8, 10)}),
    "one token": ([1], {2: None, 4: None}),
    "none": ([], {2: None, 4: None}),
}


def off(got: Tensor, want: Tensor) -> float:
    """Largest error, as a share of the largest number."""
    got, want = got.detach(), want.detach()
    assert got.shape == want.shape and got.dtype == want.dtype, (got.shape, want.shape, got.dtype, want.dtype)
    if not want.numel():
        return 0.0
    scale = float(want.abs().max())
    error = float((got - want).abs().max())
    return error if scale == 0 else error / scale


def backbone_errors(case: Case, whole: PackedBatch, shared: PackedBatch, memory, *, checkpointing: bool) -> list[float]:
    """Errors of the hidden states, of the gathered ones, and of the gradient of each parameter and of the memory."""
    share = shared.share
    one, several = (case.fresh().double() for _ in range(2))
    several.gradient_checkpointing = checkpointing
    memories = [
        None if memory is None else memory._replace(hidden=memory.hidden.clone().requires_grad_()) for _ in "ab"
    ]
    want = one(whole, memory=memories[0])[0]
    upstream = torch.randn(want.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (want * upstream).sum().backward()
    got = several(shared, memory=memories[1])[0]
    (got * share.cut(upstream)).sum().backward()
    errors = [off(got, share.cut(want)), off(gather_tokens(got, share), want)]
    alike = [*zip(several.parameters(), one.parameters(), strict=True)]
    if memory is not None:
        alike.append((memories[1].hidden, memories[0].hidden))
    sum_gradients([mine for mine, _ in alike])
    if not len(whole.tokens):  # nothing flows back where there is nothing
        return errors
    for mine, all_ in alike:
        assert (mine.grad is None) == (all_.grad is None)
        if all_.grad is not None:
            errors.append(off(mine.grad, all_.grad))
    assert len(errors) > 5
    return errors


def kernels() -> Iterator[tuple[str, Callable[..., Tensor], list[tuple[int, ...]]]]:
    """Name, kernel of a share (None: the whole batch), boundaries and inputs, and the shapes of the inputs."""

    def cell(share, cu_seqlens, q, k, v, i, f, *, reverse):
        return with_all_tokens(share, partial(mlstm, cu_seqlens=cu_seqlens, reverse=reverse), q, k, v, i, f)

    def attend(share, cu_seqlens, q, k, v, *, prefixed=False, **options):
        prefix = (cu_seqlens.diff() + 1) // 2 if prefixed else None
        return with_all_tokens(share, partial(attention, cu_seqlens=cu_seqlens, prefix=prefix, **options), q, k, v)

    def scalar(share, cu_seqlens, gates, *, reverse):
        mixing = torch.randn(4, 4, 3, 3, generator=torch.Generator().manual_seed(2), dtype=gates.dtype)
        mixing = mixing[:, share_of_heads(share, 4)]
        run = lambda some: slstm(some.transpose(1, 2), mixing, cu_seqlens=cu_seqlens, reverse=reverse)  # noqa: E731
        return with_all_tokens(share, run, gates)

    def convolve(share, cu_seqlens, x, *, taps, reverse):
        weight = torch.randn(5, taps, generator=torch.Generator().manual_seed(3), dtype=x.dtype)
        run = partial(causal_conv1d, weight=weight)
        if share is None:
            return run(x, cu_seqlens=cu_seqlens, reverse=reverse)
        return with_neighbours(share, run, x, reach=taps - 1, reverse=reverse)

    for reverse in (False, True):
        yield f"mlstm {reverse=}", partial(cell, reverse=reverse), [(4, 3), (4, 3), (4, 5), (4,), (4,)]
        yield f"slstm {reverse=}", partial(scalar, reverse=reverse), [(4, 4, 3)]
        for taps in (1, 2, 4, 8):
            yield f"convolution {taps=} {reverse=}", partial(convolve, taps=taps, reverse=reverse), [(5,)]
    seen = {"causal": {}, "bidirectional": {"causal": False}, "causal window": {"window": 3}}
    seen |= {"window": {"window": 2, "causal": False}, "prefix": {"prefixed": True}}
    for heads, kv_heads, names in ((4, 4, seen), (4, 2, seen), (4, 1, ["causal"]), (12, 3, ["causal"])):
        for name in names:
            shapes = [(heads, 6), (kv_heads, 6), (kv_heads, 3)]
            yield f"attention {heads}/{kv_heads} {name}", partial(attend, **seen[name]), shapes


def kernel_errors(run: Callable[..., Tensor], shapes: list, whole: PackedBatch, shared: PackedBatch) -> list[float]:
    """Errors of the output and of the gradient of each input."""
    generator = torch.Generator().manual_seed(len(whole.tokens))
    inputs = [torch.randn(len(whole.tokens), *s, generator=generator, dtype=torch.float64) for s in shapes]
    share, cu_seqlens = shared.share, whole.cu_seqlens
    all_inputs = [x.clone().requires_grad_() for x in inputs]
    own_inputs = [share.cut(x).clone().requires_grad_() for x in inputs]
    want, got = run(None, cu_seqlens, *all_inputs), run(share, cu_seqlens, *own_inputs)
    if not len(whole.tokens):
        return [off(got, want)]
    upstream = torch.randn(want.shape, generator=generator, dtype=torch.float64)
    wanted = torch.autograd.grad((want * upstream).sum(), all_inputs)
    gotten = torch.autograd.grad((got * share.cut(upstream)).sum(), own_inputs)
    found = [off(a, share.cut(b)) for a, b in zip((got, *gotten), (want, *wanted), strict=True)]
    assert len(inputs[0]) < 2 or all(gradient.abs().max() > 0 for gradient in wanted)
    return found


def of_two_dtypes(whole: PackedBatch, shared: PackedBatch) -> list[float]:
    """An mLSTM whose q, k and v are bfloat16 and whose gates are float32, as under autocast: the same bits."""
    shapes, share = [(4, 16), (4, 16), (4, 16), (4,), (4,)], shared.share
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(len(whole.tokens), *s, generator=generator) for s in shapes]
    inputs = [x.bfloat16() if x.ndim == 3 else x for x in inputs]
    run = partial(mlstm, cu_seqlens=whole.cu_seqlens, backend="torch")
    return [off(with_all_tokens(share, run, *map(share.cut, inputs)), share.cut(run(*inputs)))]


def gathered(whole: PackedBatch, shared: PackedBatch) -> list[float]:
    """Each process makes something else of the gathered values; the gradient is that of the sum."""
    share, rows = shared.share, len(whole.tokens)
    values = torch.arange(rows * 2.0).view(rows, 2)
    mine = share.cut(values).clone().requires_grad_()
    every = gather_tokens(mine, share)
    (every * (share.rank + 1)).sum().backward()
    return [off(every.detach(), values), off(mine.grad, torch.full_like(mine, sum(range(1, share.of + 1))))]


def training_errors(config: AnyConfig, objective: Objective, bounds: tuple[int, ...] | None) -> list[float]:
    """Errors of the loss, summed over the processes, and of the gradients of a model whose head knows species."""
    found = []
    for part in (objective, share_objective(objective, bounds=bounds)):
        torch.manual_seed(0)
        model = LanguageModel(IdTokenizer(config.vocabulary_size), config, HeadConfig(conditions=(("species", 3),)))
        torch.nn.init.normal_(model.head.conditions["species"].weight)
        loss = loss_sum(model.double(), part) / objective.weight
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
        if part is not objective:
            dist.all_reduce(found[-1][0])
            sum_gradients(model.parameters())
            found[-1][1:] = [p.grad for p in model.parameters()]
    return [off(got, want) for want, got in zip(*found, strict=True)]


def main(rank: int, processes: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(folder / "store"), processes), rank=rank, world_size=processes
    )
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fresh memory is NaN
    worst: dict[str, float] = {}
    networks = {name: case for name, case in CASES.items() if case.config.heads % processes == 0}
    for n, (layout, (lengths, bounds)) in enumerate(LAYOUTS.items()):
        tokens = torch.arange(sum(lengths)) % 7
        whole = PackedBatch.from_lengths(tokens, torch.tensor(lengths, dtype=torch.int64))
        shared = share_batch(whole, bounds=bounds[processes])
        for name, run, shapes in kernels():
            worst[f"{name}, {layout}"] = max(kernel_errors(run, shapes, whole, shared))
        worst[f"two dtypes, {layout}"] = max(of_two_dtypes(whole, shared))
        worst[f"gathered, {layout}"] = max(gathered(whole, shared))
        if sum(lengths) > len(lengths):
            species = {"species": torch.arange(len(lengths)) % 4}
            objective = causal(replace(whole, conditions=species), IdTokenizer(19).vocabulary, torch.Generator())
            edges = bounds[processes] and tuple(min(edge, len(objective.targets)) for edge in bounds[processes])
            edges = edges and (*edges[:-1], len(objective.targets))
            for name in ("7b", "decoder"):
                config = replace(CASES[name].config, heads=4)
                worst[f"training {name}, {layout}"] = max(training_errors(config, objective, edges))
        for number, (name, case) in enumerate(networks.items()):
            if (number + n) % 3:  # each network with some layouts, each layout with some networks
                continue
            inputs = case.inputs(lengths, seed=number)
            memory = inputs.memory(torch.float64) if lengths else None
            errors = partial(
                backbone_errors, case, inputs.batch(), share_batch(inputs.batch(), bounds=bounds[processes])
            )
            worst[f"{name}, {layout}"] = max(errors(memory, checkpointing=layout == "uneven"))
    (folder / f"{rank}.json").write_text(json.dumps(worst))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
