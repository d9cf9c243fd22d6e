"""Decoding, one token of each sequence at a time, beside the xlstm package: tokens per second of the 14.8 M Chem-xLSTM.

    python benchmarks/decoding.py --batches 1 64

Both are driven in turns, in one process, with the same threads: ``xLSTMLMModel.step`` in inference mode, and the
backbone and head with a state that is given away. Floors: a step reads every weight once, 59 MB in float32 and 30 MB in
bfloat16; each sequence adds 9.4 MB of matrix memory, read and written, and 29 MFLOP. A loaded machine shows nothing:
threads that wait for each other wait for whoever else runs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from machine import describe
from processive.backbones import XLSTMConfig, build
from processive.backbones.layers import Linear, apply_linear, linear_in
from processive.kernels import chosen_backend
from processive.sequences import PackedBatch
from torch import nn

VOCABULARY, WIDTH, DEPTH, HEADS = 64, 512, 9, 8


def peer_step(batch: int) -> Callable[[], None]:
    """One step of the xlstm package's model after another."""
    from xlstm.blocks.mlstm.block import mLSTMBlockConfig
    from xlstm.blocks.mlstm.layer import mLSTMLayerConfig
    from xlstm.xlstm_lm_model import xLSTMLMModel, xLSTMLMModelConfig

    layer = mLSTMLayerConfig(conv1d_kernel_size=4, qkv_proj_blocksize=4, num_heads=HEADS)
    sizes = {"vocab_size": VOCABULARY, "embedding_dim": WIDTH, "num_blocks": DEPTH, "context_length": 128}
    model = xLSTMLMModel(xLSTMLMModelConfig(mlstm_block=mLSTMBlockConfig(mlstm=layer), **sizes))
    model.reset_parameters()
    model.eval()
    tokens, carried = torch.randint(VOCABULARY, (batch, 1)), [None]

    def step() -> None:
        _, carried[0] = model.step(tokens, state=carried[0])

    return step


def our_step(batch: int, dtype: torch.dtype) -> Callable[[], None]:
    """One step of ours after another, with the matrices of the linear maps in ``dtype``."""
    network = nn.ModuleList(
        (build(XLSTMConfig(VOCABULARY, WIDTH, DEPTH, heads=HEADS)), linear_in(WIDTH, VOCABULARY, bias=False))
    )
    for module in network.eval().modules():
        if isinstance(module, Linear):
            module.weight.data = module.weight.data.to(dtype)
    backbone, head = network
    tokens = torch.randint(VOCABULARY, (batch,))
    carried = [backbone(PackedBatch.one_each(tokens, positions=torch.zeros_like(tokens)), return_state=True)[1]]

    def step() -> None:
        state = carried[0]
        hidden, carried[0] = backbone(
            PackedBatch.one_each(tokens, positions=state.lengths), state, return_state=True, reuse_state=True
        )
        apply_linear(hidden, head.weight, None)

    return step


def tokens_per_second(
    steps: dict[str, Callable[[], None]], batch: int, seconds: float
) -> dict[str, tuple[float, float]]:
    """Median and best of each, run in turns."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
        step()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, step in steps.items():
            for _ in range(3):
                start = time.perf_counter()
                step()
                times[name].append(time.perf_counter() - start)
    return {name: (batch / statistics.median(seen), batch / min(seen)) for name, seen in times.items()}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=8.0, help="for each batch size")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    print(f"{describe('xlstm')}; decoding by {chosen_backend('decoding')}")
    print("batch  what      tokens/s (median, best)   times the peer (median, best)")
    with torch.inference_mode():
        for batch in arguments.batches:
            steps = {"xlstm": peer_step(batch)}
            steps |= {"float32": our_step(batch, torch.float32), "bfloat16": our_step(batch, torch.bfloat16)}
            found = tokens_per_second(steps, batch, arguments.seconds)
            peer = found["xlstm"]
            for name, (median, best) in found.items():
                print(f"{batch:5}  {name:8} {median:8.0f} {best:8.0f} {median / peer[0]:16.2f} {best / peer[1]:8.2f}")


if __name__ == "__main__":
    main()
