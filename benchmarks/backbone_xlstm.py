"""xLSTM-7B blocks beside transformers': prefill, decoding, time per token; a group of benchmarks/backbones.py."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from backbone_peers import hf_xlstm
from backbone_race import (
    PROMPT,
    VOCABULARY,
    Machine,
    Row,
    check_decoded,
    checked_prefill,
    decode,
    decoding_rows,
    firsts,
    language_model,
    matrix_flop,
    our_decoding,
    prefill,
    prefill_rows,
    prompt,
    seconds,
    turns,
)
from processive.backbones import XLSTMConfig
from processive.models import HeadConfig
from torch import Tensor

LONG = 65_536


def xlstm_rows(machine: Machine, arguments: argparse.Namespace) -> Iterator[Row]:
    width, depth, heads = 768, 12, 4
    config = XLSTMConfig(VOCABULARY, width, depth, heads=heads, blocks="mlstm-7b")
    models = language_model("xLSTM-7B blocks", config, HeadConfig(soft_cap=30.0))
    model = models.float32
    peer: Any = hf_xlstm(model.state_dict(), vocabulary=VOCABULARY, width=width, depth=depth, heads=heads)
    tokens = prompt(PROMPT)

    @torch.inference_mode()
    def theirs() -> tuple[Tensor, Any]:
        out = peer(input_ids=tokens[None], use_cache=True)
        return out.logits[0, -1:, : len(model.vocabulary)], out.cache_params

    their_logits, cache = theirs()
    state = checked_prefill(models, tokens, their_logits)
    memory = heads * (width // 2 // heads) * (width // heads)
    if "prefill" in arguments.parts:

        def floor(dtype: torch.dtype) -> float:
            maps = machine.floor(flop=matrix_flop(model, head=False) * PROMPT, read=0, dtype=dtype)
            return maps + machine.floor(flop=4 * memory * depth * PROMPT, read=0, dtype=torch.float32)

        yield from prefill_rows(models, tokens, theirs, bars=(2, 4), floor=floor, limit=arguments.limit)

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
        check_decoded(models.name, got, want)
        yield from decoding_rows(
            machine, models, state, their_decoding(sequences, steps),
            sequences=sequences, steps=steps, bars=bars,
            flop=(matrix_flop(model, head=True) + 6 * memory * depth) * sequences,
            read=4 * memory * depth * sequences,  # what is written, as much again, is not counted
            beside="float32", limit=arguments.limit,
        )  # fmt: skip
    if "flat" in arguments.parts:
        with torch.inference_mode():
            _, long = prefill(model, prompt(LONG))
        few, many = turns([our_decoding(model, s, 1, 48) for s in (state, long)], limit=arguments.limit)
        yield Row(
            f"{models.name}, time per decoded token: after {LONG:,} / after {PROMPT:,}",
            f"{many * 1e3:.1f} ms", f"{few * 1e3:.1f} ms", many / few, 1.1, at_most=True,
        )  # fmt: skip
