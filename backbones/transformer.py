"""Transformer on packed tokens: every decoder and encoder of ``TransformerConfig`` from one block."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..errors import ConfigError, InputError, ShapeError
from ..kernels import attention, rotary
from ..kernels.packing import gate_dtype
from ..sequences import PackedBatch, SequenceShare
from .backbone import Backbone, Memory
from .layers import FeedForward, added, attention_precision, linear_in, linear_out, make_norm, small_init_
from .sequence_parallel import own_boundaries, with_all_tokens
from .state import BackboneState, KeyValueCache, Layout
from .transformer_config import TransformerConfig

EXPECTED_MASKED = 0.15 * 0.8  # share of <mask> tokens in ESM's training (Lin et al. 2023)


class Context(NamedTuple):
    """What a block needs to know of a batch.

    Attributes:
        cu_seqlens: boundaries of its sequences.
        turns: the positions that q and k turn with, each [tokens]; two: one for each half of a head's channels.
        prefix: how many of the tokens at the start of each sequence see each other both ways, or None.
        memory: what cross-attention looks at, or None.
        layout: where the tokens go in the caches of a state that the batch goes on from, or None.
        share: which of the tokens this process has, where several share the batch.
    """

    cu_seqlens: Int[Tensor, " boundaries"]
    turns: tuple[Int[Tensor, " tokens"], ...]
    prefix: Int[Tensor, " sequences"] | None = None
    memory: Memory | None = None
    layout: Layout | None = None
    share: SequenceShare | None = None


class TransformerBlock(nn.Module):
    """Attention, cross-attention where there is a memory, and feed-forward, each added to the residual stream."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = c = config
        bias, inner = c.has_bias("attention"), c.heads * c.head_dim
        self.norm = stream_norm(c)
        self.query_key_value = linear_in(c.width, (c.heads + 2 * c.kv_heads) * c.head_dim, bias=bias)
        if c.qk_norm is not None:
            query, key = (1, 1) if c.qk_norm == "head" else (c.heads, c.kv_heads)
            self.query_norm = make_norm(c.norm, query * c.head_dim, c.norm_eps)
            self.key_norm = make_norm(c.norm, key * c.head_dim, c.norm_eps)
        self.out = linear_out(inner, c.width, c.depth, bias=bias)
        if c.cross_width is not None:
            self.cross_norm = stream_norm(c)
            self.cross_query = linear_in(c.width, inner, bias=bias)
            self.cross_key_value = linear_in(c.cross_width, 2 * c.kv_heads * c.head_dim, bias=bias)
            self.cross_out = linear_out(inner, c.width, c.depth, bias=bias)
        self.feed_forward_norm = stream_norm(c)
        self.feed_forward = FeedForward(c.width, c.inner, c.depth, c.activation, bias=c.has_bias("feed_forward"))
        self.dropout = nn.Dropout(c.dropout)

    def forward(
        self, x: Float[Tensor, "tokens width"], context: Context, state: KeyValueCache | None, return_state: bool
    ) -> tuple[Float[Tensor, "tokens width"], KeyValueCache | None]:
        """Return the residual stream after the block and, when asked, the keys and values that later tokens see."""
        read, skip = self._read(x, self.norm)
        mixed, new = self._attend(read, context, state, return_state)
        x = self._add(skip, self.out, mixed, self.norm)
        if context.memory is not None:
            read, skip = self._read(x, self.cross_norm)
            edges = context.cu_seqlens if context.share is None else own_boundaries(context.share)
            mixed = self._attend_to(read, context.memory, edges)
            x = self._add(skip, self.cross_out, mixed, self.cross_norm)
        read, skip = self._read(x, self.feed_forward_norm)
        return self._add(skip, self.feed_forward, read, self.feed_forward_norm), new

    def _read(self, x: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
        """Return what a part of the block reads, and what its output is added to."""
        if self.config.norm_placement == "post":
            return x, x
        normed = norm(x)
        return normed, normed if self.config.norm_placement == "deep" else x

    def _add(self, skip: Tensor, layer: nn.Module, mixed: Tensor, norm: nn.Module) -> Tensor:
        """Return the stream with the output of a part's last layer added."""
        c = self.config
        skip = skip if c.skip_scale == 1 else skip * c.skip_scale
        x: Tensor
        if c.residual_scale != 1 or (c.dropout and self.training):
            x = skip + self.dropout(layer(mixed)) * c.residual_scale
        elif layer is self.feed_forward:
            x = layer(mixed, skip)
        else:
            x = added(layer, mixed, skip)
        return norm(x) if c.norm_placement == "post" else x

    def _attend(
        self, x: Tensor, context: Context, state: KeyValueCache | None, return_state: bool
    ) -> tuple[Tensor, KeyValueCache | None]:
        """Self-attention, of the tokens with those of their sequence that the state remembers."""
        c = self.config
        q, k, v = self._heads(x, context)
        attend = partial(
            attention,
            cu_seqlens=context.cu_seqlens,
            causal=c.direction != "bidirectional",
            window=c.window,
            prefix=context.prefix,
            precision=attention_precision(x, self.query_key_value.weight),
        )
        if context.share is not None:
            return with_all_tokens(context.share, attend, q, k, v).flatten(1), None
        if state is None or context.layout is None:
            seen = KeyValueCache(k, v, context.cu_seqlens)
        else:
            seen = state.append(k, v, context.layout)
        mixed = attend(q, seen.keys, seen.values, cu_seqlens_k=seen.cu_seqlens, lengths_k=seen.lengths).flatten(1)
        if not return_state:
            return mixed, None
        if c.window is not None and seen.lengths is None:
            seen = seen.last(c.window - 1)
        elif state is None:
            seen = KeyValueCache(k.contiguous(), v.contiguous(), seen.cu_seqlens)  # not in one memory with q
        return mixed, seen

    def _heads(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """Return q and k as they are compared, and v."""
        c = self.config
        heads = self.query_key_value(x).unflatten(1, (-1, c.head_dim))
        query_key, v = heads.split((c.heads + c.kv_heads, c.kv_heads), dim=1)
        if c.qk_norm is not None:
            q, k = query_key.split((c.heads, c.kv_heads), dim=1)
            query_key = torch.cat((_normed(q, self.query_norm), _normed(k, self.key_norm)), dim=1)
        query_key = self._turned(query_key, context)
        return query_key[:, : c.heads], query_key[:, c.heads :], v

    def attention_maps(self, x: Float[Tensor, "tokens width"], context: Context) -> list[Tensor]:
        """Return how much each token of a sequence looks at each: a [heads, tokens, tokens] for every sequence."""
        c = self.config
        q, k, _ = self._heads(self._read(x, self.norm)[0], context)
        k = k.repeat_interleave(c.heads // c.kv_heads, dim=1)
        lengths = context.cu_seqlens.diff().tolist()
        maps = []
        for one, other in zip(torch.split(q, lengths), torch.split(k, lengths), strict=True):
            products = torch.einsum("qhd,khd->hqk", one * c.head_dim**-0.5, other)
            maps.append(products.softmax(2, dtype=gate_dtype(products.dtype)))
        return maps

    def _turned(self, query_key: Tensor, context: Context) -> Tensor:
        """Turn q and k by the positions."""
        if not context.turns:
            return query_key
        c = self.config
        style: Literal["half", "interleaved"] = "interleaved" if c.positions == "rotary-interleaved" else "half"
        parts = query_key.chunk(len(context.turns), dim=2)
        turned = [
            rotary(part, turn, base=c.rotary_base, style=style, precision=c.rotary_precision)
            for part, turn in zip(parts, context.turns, strict=True)
        ]
        return turned[0] if len(turned) == 1 else torch.cat(turned, dim=2)

    def _attend_to(self, x: Tensor, memory: Memory, cu_seqlens: Tensor) -> Tensor:
        """Cross-attention, of each sequence with all of its memory."""
        c = self.config
        q = self.cross_query(x).unflatten(1, (-1, c.head_dim))
        k, v = self.cross_key_value(memory.hidden).unflatten(1, (-1, c.head_dim)).chunk(2, dim=1)
        mixed = attention(
            q,
            k,
            v,
            cu_seqlens=cu_seqlens,
            cu_seqlens_k=memory.cu_seqlens,
            causal=False,
            precision=attention_precision(x, self.cross_query.weight),
        )
        return mixed.flatten(1)


class Transformer(Backbone):
    """The network of a ``TransformerConfig``."""

    config: TransformerConfig

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        if config.max_positions is not None:
            self.positions = nn.Embedding(config.max_positions, config.width)
            small_init_(self.positions.weight, config.width)
        if config.token_types:
            self.token_types = nn.Embedding(config.token_types, config.width)
            small_init_(self.token_types.weight, config.width)
        if config.embedding_norm:
            self.embedding_norm = stream_norm(config)
        self.blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config.depth))
        last = config.has_bias("post_blocks_norm")
        norm = make_norm(config.norm, config.width, config.norm_eps, bias=last)
        self.norm = norm if config.post_blocks_norm else nn.Identity()

    def embed(self, batch: PackedBatch) -> Float[Tensor, "tokens width"]:
        """Return what the first block reads: embeddings, token dropout, learned positions, token type, norm.

        Raises:
            InputError: a sequence is longer than the table of positions.
        """
        c, x = self.config, super().embed(batch)
        if c.token_dropout is not None:
            x = without_masked(x, batch, c.token_dropout)
        if c.max_positions is not None:
            positions, rows = batch.whole.positions, batch.positions + c.position_offset
            if len(positions) and int(positions.max()) + c.position_offset >= c.max_positions:
                most = c.max_positions - c.position_offset
                raise InputError(
                    f"A sequence reaches position {int(positions.max())}; with max_positions = "
                    f"{c.max_positions} the last one is {most - 1}.",
                    hint=f"Cut sequences to {most} tokens.",
                )
            x = x + self.positions(rows)
        if c.token_types:
            x = x + self.token_types.weight[0]
        return self.embedding_norm(x) if c.embedding_norm else x

    def attention_maps(self, batch: PackedBatch) -> Iterator[list[Tensor]]:
        """Yield the attention maps of each block, see ``TransformerBlock.attention_maps``: they need much memory.

        Raises:
            ConfigError: not every token sees its whole sequence, or this process has a share of the batch alone.
        """
        c = self.config
        if batch.share is not None:
            raise ConfigError("Attention maps are of whole sequences: they are not made of a share of a batch.")
        if c.direction != "bidirectional" or c.window is not None or c.complement is not None:
            raise ConfigError("Attention maps are made where every token sees its whole sequence, and one strand.")
        x, context = self.embed(batch), self.context(batch, None)
        for block in self.blocks:
            assert isinstance(block, TransformerBlock)
            yield block.attention_maps(x, context)
            x = block(x, context, None, False)[0]

    def context(self, batch: PackedBatch, state: BackboneState | None, *, reuse_state: bool = False) -> Context:
        """Return boundaries, positions, prefixes, and where the state takes up the tokens.

        Raises:
            InputError: the batch goes on from a state, and its positions do not, or its prefix would have to.
            ConfigError: the heads are not divisible by the processes that share the batch.
        """
        if batch.share is not None:
            batch.share.check_heads(self.config.heads)
        in_blanks = batch.block_positions is not None  # positions that begin at a mask's, or behind it
        if state is not None and self.config.positions != "none" and not in_blanks:
            some = batch.lengths > 0
            if not torch.equal(batch.positions[batch.cu_seqlens[:-1][some]], state.lengths[some]):
                raise InputError(
                    "The positions of a continued batch do not go on from its state.",
                    hint="Pack it with offsets=state.lengths.",
                )
        prefix = self._prefix(batch, state) if self.config.prefixed else None
        turns: tuple[Tensor, ...] = ()
        if self.config.positions == "rotary-2d":
            turns = two_positions(batch, prefix, bidirectional=self.config.direction == "bidirectional")
        elif self.config.rotates:
            turns = (batch.positions,)
        if prefix is not None and state is not None:
            prefix = prefix * (state.lengths == 0)  # else it has been read, and all that is left is causal
        layout = None
        if state is not None:
            layout = Layout.behind(state.blocks[0], batch.cu_seqlens, reuse=reuse_state, window=self.config.window)
        return Context(batch.cu_seqlens, turns, prefix, layout=layout, share=batch.share)

    def _prefix(self, batch: PackedBatch, state: BackboneState | None) -> Int[Tensor, " sequences"]:
        prefix = batch.conditions.get("prefix")
        if prefix is None:
            if state is not None and (self.config.positions != "rotary-2d" or batch.block_positions is not None):
                return torch.zeros_like(state.lengths)
            raise InputError(
                "How many tokens of each sequence see each other both ways is not said.",
                hint="Give the batch conditions={'prefix': <int64 [sequences]>}.",
            )
        if prefix.shape != (len(batch),):
            raise ShapeError("prefix", tuple(prefix.shape), (len(batch),))
        first = batch.lengths if state is None else torch.where(state.lengths > 0, state.lengths, batch.lengths)
        outside = (first > 0) & (prefix > first)
        if outside.any():
            s = int(outside.nonzero()[0])
            raise InputError(
                f"Sequence {s} has a prefix of {int(prefix[s])} tokens, and its first piece only {int(first[s])}: "
                "tokens that see each other both ways must be read together.",
                hint="Begin with a piece that holds the whole prefix.",
            )
        return prefix

    def with_memory(self, context: Context, memory: Memory) -> Context:
        """Return the context with what cross-attention looks at.

        Raises:
            ConfigError: the configuration has no cross-attention.
            ShapeError: the memory is of another width or number of sequences.
        """
        if self.config.cross_width is None:
            raise ConfigError("There is no cross-attention to a memory: its cross_width is None.")
        expected = self.config.cross_width, len(context.cu_seqlens)
        if (memory.hidden.shape[-1], len(memory.cu_seqlens)) != expected:
            got = tuple(memory.hidden.shape), f"{len(memory.cu_seqlens) - 1} sequences"
            raise ShapeError("memory", got, f"[tokens, {expected[0]}] of {expected[1] - 1} sequences")
        return context._replace(memory=memory)


def stream_norm(config: TransformerConfig) -> nn.Module:
    """Return a norm of the residual stream."""
    return make_norm(config.norm, config.width, config.norm_eps, bias=config.has_bias("norm"))


def without_masked(x: Float[Tensor, "tokens width"], batch: PackedBatch, mask: int) -> Float[Tensor, "tokens width"]:
    """ESM-2's token dropout: mask tokens are zero, and the others make up for it."""
    masked = batch.tokens.eq(mask)
    counts = F.pad(batch.whole.tokens.eq(mask).cumsum(0), (1, 0))[batch.cu_seqlens].diff()
    kept = 1 - counts.to(torch.promote_types(x.dtype, torch.float32)) / batch.lengths.clamp(min=1)
    scale = (1 - EXPECTED_MASKED) / kept.clamp(min=1e-6)  # nothing kept: every embedding is zero, any scale will do
    scale = torch.where(masked, 0.0, scale[batch.sequence_ids])
    return x * scale[:, None].to(x.dtype)


def two_positions(
    batch: PackedBatch, prefix: Int[Tensor, " sequences"] | None, *, bidirectional: bool
) -> tuple[Int[Tensor, " tokens"], Int[Tensor, " tokens"]]:
    """Return GLM's two positions (Du et al. 2022, arXiv:2103.10360, section 2.1), which add up to ``batch.positions``.

    The first is the place among the tokens seen both ways, and for a token that is written into a blank that of its
    mask; the second is the place in the blank, from 1 (``batch.block_positions``). Where the batch does not tell these,
    the first stands still after the last token of the prefix, where the second begins to count. So an encoder counts
    the first (the second is 0) and a decoder the second, as xTrimoPGLM 100B does.
    """
    if bidirectional:
        return batch.positions, torch.zeros_like(batch.positions)
    if prefix is None:
        return torch.zeros_like(batch.positions), batch.positions
    if batch.block_positions is not None:
        return batch.positions - batch.block_positions, batch.block_positions
    last = (prefix - 1).clamp(min=0)[batch.sequence_ids]
    first = torch.minimum(batch.positions, last)
    return first, batch.positions - first


def _normed(x: Tensor, norm: nn.Module) -> Tensor:
    """Normalise over as many channels as the norm has weights: a head's, or those of all heads."""
    weight = norm.weight
    assert isinstance(weight, Tensor)
    normed: Tensor = norm(x) if len(weight) == x.shape[2] else norm(x.flatten(1)).view_as(x)
    return normed
