"""A Llama beside transformers': prefill, and decoding with a cache; a group of benchmarks/backbones.py."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from backbone_peers import hf_llama
from backbone_race import (
    PROMPT,
    VOCABULARY,
    Machine,
    Row,
    check_decoded,
    checked_prefill,
    copied,
    decode,
    decoding_rows,
    firsts,
    language_model,
    matrix_flop,
    prefill_rows,
    prompt,
    seconds,
)
from processive.backbones import TransformerConfig
from processive.models import HeadConfig
from torch import Tensor
from transformers import DynamicCache


def llama_rows(machine: Machine, arguments: argparse.Namespace) -> Iterator[Row]:
    width, depth, heads, kv_heads, inner = 768, 12, 12, 4, 2048
    config = TransformerConfig(
        VOCABULARY, width, depth, heads=heads, key_value_heads=kv_heads, feed_forward_width=inner
    )
    models = language_model("Llama shape", config, HeadConfig())
    model = models.float32
    shape = {"width": width, "depth": depth, "heads": heads, "kv_heads": kv_heads, "inner": inner}
    peer: Any = hf_llama(model.state_dict(), vocabulary=VOCABULARY, **shape)
    tokens = prompt(PROMPT)

    @torch.inference_mode()
    def theirs() -> tuple[Tensor, Any]:
        out = peer(input_ids=tokens[None], use_cache=True, logits_to_keep=1)
        return out.logits[0, :, : len(model.vocabulary)], out.past_key_values

    their_logits, cache = theirs()
    state = checked_prefill(models, tokens, their_logits)
    assert isinstance(cache, DynamicCache)
    if "prefill" in arguments.parts:
        flop = matrix_flop(model, head=False) * PROMPT + 4 * width * depth * PROMPT**2 / 2

        def floor(dtype: torch.dtype) -> float:
            return machine.floor(flop=flop, read=0, dtype=dtype)

        yield from prefill_rows(models, tokens, theirs, bars=(2, None), floor=floor, limit=arguments.limit)

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

    for sequences, steps, bar in ((1, 24, 1.5), (16, 4, 3)):
        if f"decode{sequences}" not in arguments.parts:
            continue
        with torch.inference_mode():
            ids = torch.cat((tokens, firsts(1)))
            own = copy.deepcopy(cache)
            want = peer.generate(
                ids[None], attention_mask=torch.ones_like(ids)[None], past_key_values=own, do_sample=False,
                min_new_tokens=8, max_new_tokens=8,
            )[0, -8:]  # fmt: skip
            got = decode(model, firsts(1), copied(state), 8)[0][:, 0]
        check_decoded(models.name, got, want)
        yield from decoding_rows(
            machine, models, state, their_decoding(sequences, steps),
            sequences=sequences, steps=steps, bars=(bar, None),
            flop=matrix_flop(model, head=True) * sequences,
            read=2 * 4 * kv_heads * (width // heads) * depth * (PROMPT + 1) * sequences,
            beside="generate in float32", limit=arguments.limit,
        )  # fmt: skip
