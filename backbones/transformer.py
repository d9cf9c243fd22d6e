"""Transformer on packed tokens: a decoder as Llama has it, or an encoder as ESM-2 has it, from one block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..errors import ConfigError, InputError
from ..kernels import attention, rotary
from ..sequences import PackedBatch
from .backbone import Backbone, BackboneConfig
from .layers import ACTIVATIONS, FeedForward, linear_in, linear_out, make_norm, round_up
from .state import BackboneState, KeyValueCache

DIRECTIONS = ("causal", "bidirectional")
NORMS = ("rms", "layer")
EXPECTED_MASKED = 0.15 * 0.8  # share of <mask> tokens in ESM's training (Lin et al. 2023)


@dataclass(frozen=True)
class TransformerConfig(BackboneConfig):
    """A pre-norm transformer as plain values; the defaults make a decoder as Llama.

    An encoder as ESM-2 (Lin et al. 2023): ``direction="bidirectional", norm="layer", activation="gelu", bias=True,
    token_dropout=<id of the mask token>``.

    Attributes:
        vocabulary_size: rows of the embedding; may be padded beyond the tokens there are.
        width: channels of the residual stream.
        depth: number of blocks.
        heads: heads of the queries.
        key_value_heads: heads of keys and values, each shared by heads / key_value_heads queries; None: heads.
        direction: ``"causal"`` or ``"bidirectional"``.
        norm: ``"rms"`` or ``"layer"`` (with bias where ``bias``).
        activation: of the feed-forward, ``"swiglu"``, ``"geglu"`` or ``"gelu"``.
        feed_forward_width: inner width of the feed-forward; None: 4 widths (gelu), or 8/3 widths, up to a multiple of
            64 (gated).
        bias: biases on linear maps and LayerNorms.
        rotary_base: of the rotary positions (rotate-half); None: none, and the order of tokens is not seen.
        window: tokens that a token sees, itself included, on each side that it sees; None: all.
        token_dropout: id of the mask token whose embedding is zeroed, the rest of its sequence scaled by
            (1 - 0.12) / (1 - share of mask tokens), at inference too, as ESM-2 does; None: none of that.
        dropout: share of each half block's output set to zero in training.
        norm_eps: of every norm.
        post_blocks_norm: a norm after the last block.
    """

    family: ClassVar[str] = "transformer"

    heads: int = 4
    key_value_heads: int | None = None
    direction: str = "causal"
    norm: str = "rms"
    activation: str = "swiglu"
    feed_forward_width: int | None = None
    bias: bool = False
    rotary_base: float | int | None = 10000.0
    window: int | None = None
    token_dropout: int | None = None
    dropout: float | int = 0.0
    norm_eps: float | int = 1e-5
    post_blocks_norm: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in (("direction", DIRECTIONS), ("norm", NORMS), ("activation", tuple(ACTIVATIONS))):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it can be {', '.join(allowed)}.")
        for name in ("vocabulary_size", "width", "depth", "heads", "kv_heads", "inner"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.width % self.heads:
            raise ConfigError(f"The width {self.width} is not divisible by {self.heads} heads.")
        if self.heads % self.kv_heads:
            raise ConfigError(f"{self.heads} heads are not divisible by {self.kv_heads} key_value_heads.")
        if self.rotary_base is not None and self.head_dim % 2:
            raise ConfigError(f"Rotary positions turn pairs of channels; a head has {self.head_dim}.")
        if self.window is not None and self.window < 1:
            raise ConfigError(f"window is {self.window}; it must be at least 1.")
        if self.token_dropout is not None and self.direction == "causal":
            raise ConfigError("token_dropout looks at the whole sequence: it needs direction='bidirectional'.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout is {self.dropout}; it must be at least 0 and below 1.")

    @property
    def causal(self) -> bool:
        """Whether no token sees a later one."""
        return self.direction == "causal" and self.complement is None

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return self.width // self.heads

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.heads if self.key_value_heads is None else self.key_value_heads

    @property
    def inner(self) -> int:
        """Inner width of the feed-forward."""
        if self.feed_forward_width is not None:
            return self.feed_forward_width
        return 4 * self.width if self.activation == "gelu" else round_up(8 / 3 * self.width, 64)


class Context(NamedTuple):
    """What a block needs to know of a batch: boundaries and positions of its tokens."""

    cu_seqlens: Int[Tensor, " boundaries"]
    positions: Int[Tensor, " tokens"]


class TransformerBlock(nn.Module):
    """``x + out(attention(norm x))``, then ``x + feed_forward(norm x)``."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        width, depth = config.width, config.depth
        self.norm = make_norm(config.norm, width, config.norm_eps, bias=config.bias)
        heads = config.heads + 2 * config.kv_heads
        self.query_key_value = linear_in(width, heads * config.head_dim, bias=config.bias)
        self.out = linear_out(width, width, depth, bias=config.bias)
        self.feed_forward_norm = make_norm(config.norm, width, config.norm_eps, bias=config.bias)
        self.feed_forward = FeedForward(width, config.inner, depth, config.activation, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Float[Tensor, "tokens width"], context: Context, state: KeyValueCache | None, return_state: bool
    ) -> tuple[Float[Tensor, "tokens width"], KeyValueCache | None]:
        """Return the residual stream after the block and, when asked, the keys and values that later tokens see."""
        c = self.config
        heads = self.query_key_value(self.norm(x)).unflatten(1, (-1, c.head_dim))
        query_key, v = heads.split((c.heads + c.kv_heads, c.kv_heads), dim=1)
        if c.rotary_base is not None:
            query_key = rotary(query_key, context.positions, base=c.rotary_base)
        q, k = query_key.split((c.heads, c.kv_heads), dim=1)
        new = None
        if state is None:
            mixed = attention(q, k, v, cu_seqlens=context.cu_seqlens, causal=c.direction == "causal", window=c.window)
            new = KeyValueCache(k, v, context.cu_seqlens) if return_state else None
        else:
            new = state.append(k, v, context.cu_seqlens)
            mixed = attention(
                q,
                new.keys,
                new.values,
                cu_seqlens=context.cu_seqlens,
                cu_seqlens_k=new.cu_seqlens,
                causal=True,
                window=c.window,
            )
        if new is not None and c.window is not None:
            new = new.last(c.window - 1)
        x = x + self.dropout(self.out(mixed.flatten(1)))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x))), new if return_state else None


class Transformer(Backbone):
    """The network of a ``TransformerConfig``."""

    config: TransformerConfig

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config.depth))
        norm = make_norm(config.norm, config.width, config.norm_eps, bias=config.bias)
        self.norm = norm if config.post_blocks_norm else nn.Identity()

    def embed(self, batch: PackedBatch) -> Float[Tensor, "tokens width"]:
        """Return the embedding of each token, with ESM-2's token dropout where the configuration has it."""
        x = super().embed(batch)
        if self.config.token_dropout is None:
            return x
        masked = batch.tokens == self.config.token_dropout
        counts = F.pad(masked.cumsum(0), (1, 0))[batch.cu_seqlens].diff()
        kept = 1 - counts / batch.lengths.clamp(min=1)
        scale = (1 - EXPECTED_MASKED) / kept.clamp(min=1e-6)  # nothing kept: every embedding is zero, any scale will do
        scale = torch.where(masked, 0.0, scale[batch.sequence_ids])
        return x * scale[:, None].to(x.dtype)

    def context(self, batch: PackedBatch, state: BackboneState | None) -> Context:
        """Return boundaries and positions.

        Raises:
            InputError: the batch goes on from a state, and its positions do not.
        """
        if state is not None and self.config.rotary_base is not None:
            some = batch.lengths > 0
            if not torch.equal(batch.positions[batch.cu_seqlens[:-1][some]], state.lengths[some]):
                raise InputError(
                    "The positions of a continued batch do not go on from its state.",
                    hint="Pack it with offsets=state.lengths.",
                )
        return Context(batch.cu_seqlens, batch.positions)
