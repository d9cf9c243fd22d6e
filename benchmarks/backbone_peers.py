"""Peers' networks with our weights, for benchmarks/backbones.py: fair-esm's, and transformers' Esm, Llama, xLSTM."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

Weights = Mapping[str, Tensor]


def filled(network: nn.Module, named: Iterator[tuple[str, Tensor]]) -> nn.Module:
    """Copy tensors into a network that must have all of them; what it has beside them must be buffers or unused."""
    places = dict(network.named_parameters())
    with torch.no_grad():
        for name, tensor in named:
            places[name].copy_(tensor)
    return network.eval()


def pairs(theirs: str, ours: Weights, own: str) -> Iterator[tuple[str, Tensor]]:
    for suffix in ("weight", "bias"):
        if f"{own}.{suffix}" in ours:
            yield f"{theirs}.{suffix}", ours[f"{own}.{suffix}"]


def split(theirs: list[str], sizes: list[int], ours: Weights, own: str) -> Iterator[tuple[str, Tensor]]:
    for suffix in ("weight", "bias"):
        if f"{own}.{suffix}" in ours:
            parts = ours[f"{own}.{suffix}"].split(sizes)
            yield from ((f"{name}.{suffix}", part) for name, part in zip(theirs, parts, strict=True))


def fair_esm(ours: Weights, *, depth: int, width: int, heads: int) -> nn.Module:
    """Return fair-esm's ESM2."""
    from esm.model.esm2 import ESM2

    def named() -> Iterator[tuple[str, Tensor]]:
        yield "embed_tokens.weight", ours["backbone.embedding.weight"]
        yield from pairs("emb_layer_norm_after", ours, "backbone.norm")
        yield from pairs("lm_head.dense", ours, "head.dense")
        yield from pairs("lm_head.layer_norm", ours, "head.norm")
        yield "lm_head.bias", ours["head.bias"]
        for i in range(depth):
            there, here = f"layers.{i}", f"backbone.blocks.{i}"
            names = [f"{there}.self_attn.{part}_proj" for part in "qkv"]
            yield from split(names, [width] * 3, ours, f"{here}.query_key_value")
            for theirs, own in (
                ("self_attn.out_proj", "out"),
                ("self_attn_layer_norm", "norm"),
                ("final_layer_norm", "feed_forward_norm"),
                ("fc1", "feed_forward.up"),
                ("fc2", "feed_forward.down"),
            ):
                yield from pairs(f"{there}.{theirs}", ours, f"{here}.{own}")

    return filled(ESM2(num_layers=depth, embed_dim=width, attention_heads=heads), named())


def fair_esm_batches(fasta: Path, tokens: int) -> list[tuple[list[str], Tensor]]:
    """Return the labels and padded tokens of every batch, as fair-esm's extract.py makes them, without truncation."""
    from esm import Alphabet, FastaBatchedDataset

    alphabet = Alphabet.from_architecture("ESM-1b")
    dataset = FastaBatchedDataset.from_file(fasta)
    convert = alphabet.get_batch_converter()
    groups = dataset.get_batch_indices(tokens, extra_toks_per_seq=1)
    batches = [convert([dataset[i] for i in group]) for group in groups]
    return [(labels, padded) for labels, _, padded in batches]


def hf_esm(ours: Weights, *, depth: int, width: int, heads: int) -> nn.Module:
    """Return transformers' EsmModel, with its own choice of attention."""
    from transformers import EsmConfig, EsmModel

    config = EsmConfig(
        vocab_size=33,
        mask_token_id=32,
        pad_token_id=1,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        position_embedding_type="rotary",
        token_dropout=True,
        layer_norm_eps=1e-5,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )

    def named() -> Iterator[tuple[str, Tensor]]:
        yield "embeddings.word_embeddings.weight", ours["backbone.embedding.weight"]
        yield from pairs("encoder.emb_layer_norm_after", ours, "backbone.norm")
        for i in range(depth):
            there, here = f"encoder.layer.{i}", f"backbone.blocks.{i}"
            names = [f"{there}.attention.self.{part}" for part in ("query", "key", "value")]
            yield from split(names, [width] * 3, ours, f"{here}.query_key_value")
            for theirs, own in (
                ("attention.output.dense", "out"),
                ("attention.LayerNorm", "norm"),
                ("LayerNorm", "feed_forward_norm"),
                ("intermediate.dense", "feed_forward.up"),
                ("output.dense", "feed_forward.down"),
            ):
                yield from pairs(f"{there}.{theirs}", ours, f"{here}.{own}")

    return filled(EsmModel(config, add_pooling_layer=False), named())


def hf_llama(
    ours: Weights, *, vocabulary: int, width: int, depth: int, heads: int, kv_heads: int, inner: int
) -> nn.Module:
    """Return transformers' LlamaForCausalLM, with its own choice of attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=inner,
        rms_norm_eps=1e-5,
        max_position_embeddings=65_536,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    head_dim = width // heads

    def named() -> Iterator[tuple[str, Tensor]]:
        yield "model.embed_tokens.weight", ours["backbone.embedding.weight"]
        yield "model.norm.weight", ours["backbone.norm.weight"]
        yield "lm_head.weight", ours["head.weight"]
        for i in range(depth):
            there, here = f"model.layers.{i}", f"backbone.blocks.{i}"
            names = [f"{there}.self_attn.{part}_proj" for part in "qkv"]
            sizes = [width, kv_heads * head_dim, kv_heads * head_dim]
            yield from split(names, sizes, ours, f"{here}.query_key_value")
            names = [f"{there}.mlp.{part}_proj" for part in ("gate", "up")]
            yield from split(names, [inner, inner], ours, f"{here}.feed_forward.up")
            for theirs, own in (
                ("self_attn.o_proj", "out"),
                ("mlp.down_proj", "feed_forward.down"),
                ("input_layernorm", "norm"),
                ("post_attention_layernorm", "feed_forward_norm"),
            ):
                yield from pairs(f"{there}.{theirs}", ours, f"{here}.{own}")

    return filled(LlamaForCausalLM(config), named())


def hf_xlstm(ours: Weights, *, vocabulary: int, width: int, depth: int, heads: int) -> nn.Module:
    """Return transformers' xLSTMForCausalLM, with its own choice of kernels."""
    from transformers import xLSTMConfig, xLSTMForCausalLM

    config = xLSTMConfig(
        vocab_size=vocabulary, hidden_size=width, num_hidden_layers=depth, num_blocks=depth, num_heads=heads
    )

    def named() -> Iterator[tuple[str, Tensor]]:
        yield "backbone.embeddings.weight", ours["backbone.embedding.weight"]
        yield "backbone.out_norm.weight", ours["backbone.norm.weight"]
        yield "lm_head.weight", ours["head.weight"]
        for i in range(depth):
            there, here = f"backbone.blocks.{i}", f"backbone.blocks.{i}"
            names = [f"{there}.mlstm_layer.{part}" for part in ("q", "k", "v", "ogate_preact")]
            yield from split(names, [width // 2, width // 2, width, width], ours, f"{here}.query_key_value_output")
            names = [f"{there}.mlstm_layer.{part}" for part in ("igate_preact", "fgate_preact")]
            yield from split(names, [heads, heads], ours, f"{here}.gates")
            inner = len(ours[f"{here}.feed_forward.up.weight"]) // 2
            names = [f"{there}.ffn.{part}" for part in ("proj_up_gate", "proj_up")]
            yield from split(names, [inner, inner], ours, f"{here}.feed_forward.up")
            yield f"{there}.mlstm_layer.multihead_norm.weight", ours[f"{here}.head_norm.weight"].flatten()
            for theirs, own in (
                ("mlstm_layer.out_proj", "out"),
                ("ffn.proj_down", "feed_forward.down"),
                ("norm_mlstm", "norm"),
                ("norm_ffn", "feed_forward_norm"),
            ):
                yield from pairs(f"{there}.{theirs}", ours, f"{here}.{own}")

    return filled(xLSTMForCausalLM(config), named())
