"""The gradient of one long sequence: peak memory and time, plain, by blocks, and piece by piece.

    OMP_NUM_THREADS=2 python benchmarks/long_training.py [--tokens 65536] [--piece 2048]

Each measurement is a process of its own, so that its peak (VmHWM) is its own; told is what it has above what the same
process had before. "by blocks" is ``gradient_checkpointing=True``, "whole" is ``long="whole"``
(``training/long.py``). All three gradients are the same; their norms are printed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from functools import partial

WAYS = ("plain", "by blocks", "whole")
NETWORKS = ("mLSTM", "sLSTM", "7B", "transformer")


def measure(network: str, way: str, tokens: int, piece: int, width: int) -> dict[str, float]:
    """Take one gradient in this process."""
    import torch
    from long_dna import memory
    from processive.backbones import TransformerConfig, XLSTMConfig
    from processive.bio.tokenizer import DNATokenizer
    from processive.models import LanguageModel
    from processive.sequences import PackedBatch
    from processive.training.long import backward_in_pieces
    from processive.training.objectives import causal
    from processive.training.passes import Direct

    torch.manual_seed(0)
    tokenizer = DNATokenizer()
    size = len(tokenizer.vocabulary)
    kinds = {"mLSTM": "mlstm", "sLSTM": ("mlstm", "slstm"), "7B": "mlstm-7b"}
    model = LanguageModel(
        tokenizer,
        XLSTMConfig(size, width, 2, heads=4, blocks=kinds[network])
        if network in kinds
        else TransformerConfig(size, width, 2, heads=4, direction="causal"),
    ).train()
    ids = torch.randint(5, size, (tokens + 1,))
    objective = causal(PackedBatch.from_sequences([ids]), tokenizer.vocabulary, torch.Generator())
    few = causal(PackedBatch.from_sequences([ids[:100]]), tokenizer.vocabulary, torch.Generator())
    model.backbone.gradient_checkpointing = way == "by blocks"
    read = partial(backward_in_pieces, Direct(model), tokens=piece if way == "whole" else tokens)
    read(few)  # what is done once
    model.zero_grad()
    before, began = memory("VmHWM"), time.perf_counter()
    loss = read(objective, scale=1 / objective.weight)
    seconds = time.perf_counter() - began
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    return {"megabytes": memory("VmHWM") - before, "seconds": seconds, "loss": float(loss), "norm": float(norm)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--piece", type=int, default=2048)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--networks", nargs="+", default=["mLSTM", "sLSTM", "7B"], choices=NETWORKS)
    parser.add_argument("--one", nargs=2, metavar=("NETWORK", "WAY"), help="one measurement")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*options.one, options.tokens, options.piece, options.width)))
        return
    from machine import describe

    print(describe())
    print(f"\n{options.tokens:,} tokens, pieces of {options.piece:,}, width {options.width}, 2 blocks\n")
    print("| network | way | peak MB above | µs per token | loss | gradient norm |\n|---|---|---|---|---|---|")
    for network in options.networks:
        for way in WAYS:
            sizes = ["--tokens", str(options.tokens), "--piece", str(options.piece), "--width", str(options.width)]
            command = [sys.executable, __file__, *sizes, "--one", network, way]
            run = subprocess.run(command, capture_output=True, text=True, check=True)
            found = json.loads(run.stdout.splitlines()[-1])
            print(
                f"| {network} | {way} | {found['megabytes']:.0f} | {found['seconds'] / options.tokens * 1e6:.1f} "
                f"| {found['loss']:.5f} | {found['norm']:.5f} |"
            )


if __name__ == "__main__":
    main()
