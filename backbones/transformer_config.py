"""The configuration of a transformer: what each published one differs in, as plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..errors import ConfigError
from ..kernels.rotary import PRECISIONS
from .backbone import BackboneConfig
from .layers import ACTIVATIONS, GATED, round_up

CHOICES = {
    "direction": ("causal", "bidirectional", "prefix"),
    "norm": ("rms", "layer"),
    "norm_placement": ("pre", "post", "deep"),
    "activation": ACTIVATIONS,
    "qk_norm": (None, "width", "head"),
    "rotary_precision": (None, *PRECISIONS),
    "positions": ("rotary", "rotary-interleaved", "rotary-2d", "absolute", "none"),
}


@dataclass(frozen=True)
class TransformerConfig(BackboneConfig):
    """A transformer as plain values; the defaults make a decoder as Llama.

    An encoder as ESM-2 (Lin et al. 2023): ``direction="bidirectional", norm="layer", activation="gelu", bias=True,
    token_dropout=<id of the mask token>``. One as BERT (Devlin et al. 2019): ``direction="bidirectional",
    norm="layer", norm_placement="post", activation="gelu", bias=True, positions="absolute", max_positions=512,
    embedding_norm=True, token_types=2, post_blocks_norm=False``.

    Attributes:
        vocabulary_size: rows of the embedding; may be padded beyond the tokens there are.
        width: channels of the residual stream.
        depth: number of blocks.
        heads: heads of the queries.
        key_value_heads: heads of keys and values, each shared by heads / key_value_heads queries; None: heads.
        head_width: channels of a head; None: width / heads.
        direction: ``"causal"``, ``"bidirectional"``, or ``"prefix"``: the first tokens of each sequence, as many as
            ``batch.conditions["prefix"]`` says, see each other both ways, and later ones are causal.
        norm: ``"rms"`` or ``"layer"``.
        norm_placement: where the norm n of a half block f stands, ``"pre"``: x + f(n(x)), ``"post"``: n(x + f(x)), as
            in BERT, or ``"deep"``: skip_scale n(x) + f(n(x)), as in xTrimoPGLM.
        skip_scale: factor of the stream where a half block's output is added to it.
        residual_scale: factor of that output.
        activation: of the feed-forward, ``"swiglu"``, ``"geglu"``, ``"gelu"`` (of erf) or ``"relu"``.
        feed_forward_width: inner width of the feed-forward; None: 4 widths, or where it is gated 8/3 widths up to a
            multiple of 64.
        bias: biases on linear maps and LayerNorms.
        attention_bias: on the linear maps of the attention; None: as ``bias``.
        feed_forward_bias: on the linear maps of the feed-forward; None: as ``bias``.
        norm_bias: on LayerNorms; None: as ``bias``.
        qk_norm: a norm without bias on q and k before they turn, over all heads together (``"width"``) or over each
            (``"head"``).
        positions: ``"rotary"`` (rotate-half), ``"rotary-interleaved"``, ``"rotary-2d"`` (of each head's channels the
            first half turns with the place among tokens seen both ways, the second with the place among those written
            into a blank, see ``two_positions``), ``"absolute"`` (a learned table) or ``"none"``.
        rotary_base: of the rotary positions.
        rotary_precision: dtype whose values the rotary frequencies have where a checkpoint was trained so,
            ``"float32"``, ``"float16"`` or ``"bfloat16"``; None: exact, which only long sequences can tell apart.
        max_positions: rows of the learned table.
        position_offset: row of the learned table that belongs to position 0.
        window: tokens that a token sees, itself included, on each side that it sees; None: all.
        token_dropout: id of the mask token whose embedding is zeroed, the rest of its sequence scaled by
            (1 - 0.12) / (1 - share of mask tokens), at inference too, as ESM-2 does; None: none of that.
        dropout: share of each half block's output set to zero in training.
        norm_eps: of every norm.
        post_blocks_norm: a norm after the last block.
        post_blocks_norm_bias: whether it has a bias; None: as the other norms.
        embedding_norm: a norm before the first block.
        token_types: rows of a table whose first is added to every embedding, as BERT does; 0: no table.
        cross_width: channels of a memory that each block looks at between its halves; None: it looks at none.
    """

    family: ClassVar[str] = "transformer"

    heads: int = 4
    key_value_heads: int | None = None
    head_width: int | None = None
    direction: str = "causal"
    norm: str = "rms"
    norm_placement: str = "pre"
    skip_scale: float | int = 1.0
    residual_scale: float | int = 1.0
    activation: str = "swiglu"
    feed_forward_width: int | None = None
    bias: bool = False
    attention_bias: bool | None = None
    feed_forward_bias: bool | None = None
    norm_bias: bool | None = None
    qk_norm: str | None = None
    positions: str = "rotary"
    rotary_base: float | int = 10000.0
    rotary_precision: str | None = None
    max_positions: int | None = None
    position_offset: int = 0
    window: int | None = None
    token_dropout: int | None = None
    dropout: float | int = 0.0
    norm_eps: float | int = 1e-5
    post_blocks_norm: bool = True
    post_blocks_norm_bias: bool | None = None
    embedding_norm: bool = False
    token_types: int = 0
    cross_width: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it can be {', '.join(map(str, allowed))}.")
        for name in ("vocabulary_size", "width", "depth", "heads", "kv_heads", "inner"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        for name in ("head_width", "window", "max_positions", "cross_width"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        for name in ("position_offset", "token_types"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 0.")
        for name in ("skip_scale", "residual_scale", "rotary_base"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be above 0.")
        if self.head_width is None and self.width % self.heads:
            raise ConfigError(f"The width {self.width} is not divisible by {self.heads} heads.")
        if self.heads % self.kv_heads:
            raise ConfigError(f"{self.heads} heads are not divisible by {self.kv_heads} key_value_heads.")
        self._check_positions()
        if self.token_dropout is not None and self.direction != "bidirectional":
            raise ConfigError("token_dropout looks at the whole sequence: it needs direction='bidirectional'.")
        if self.complement is not None and self.direction == "prefix":
            raise ConfigError("A prefix is of one strand: with a complement, direction cannot be 'prefix'.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout is {self.dropout}; it must be at least 0 and below 1.")

    def _check_positions(self) -> None:
        if self.rotates and self.head_dim % (4 if self.positions == "rotary-2d" else 2):
            pairs = "pairs of channels in each half of a head" if self.positions == "rotary-2d" else "pairs of channels"
            raise ConfigError(f"Rotary positions turn {pairs}; a head has {self.head_dim}.")
        if self.positions != "absolute":
            if self.max_positions is not None or self.position_offset:
                raise ConfigError("max_positions and position_offset belong to the table of positions='absolute'.")
        elif self.max_positions is None or self.max_positions <= self.position_offset:
            raise ConfigError(
                f"positions='absolute' need max_positions, the rows of their table, above the position_offset "
                f"{self.position_offset}; it is {self.max_positions}."
            )

    @property
    def causal(self) -> bool:
        """Whether no token sees a later one."""
        return self.direction == "causal" and self.complement is None

    @property
    def streams(self) -> bool:
        """Whether a sequence can be read piece by piece."""
        return self.direction != "bidirectional" and self.complement is None

    @property
    def prefixed(self) -> bool:
        """Whether a batch must say how many tokens of each sequence see each other both ways."""
        return self.direction == "prefix"

    @property
    def positional(self) -> bool:
        """Whether the positions of a batch change what the network gives."""
        return self.positions != "none"

    @property
    def rotates(self) -> bool:
        """Whether q and k turn with the position."""
        return self.positions.startswith("rotary")

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return self.width // self.heads if self.head_width is None else self.head_width

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.heads if self.key_value_heads is None else self.key_value_heads

    @property
    def inner(self) -> int:
        """Inner width of the feed-forward."""
        if self.feed_forward_width is not None:
            return self.feed_forward_width
        return round_up(8 / 3 * self.width, 64) if self.activation in GATED else 4 * self.width

    def has_bias(self, part: str) -> bool:
        """Whether the ``"attention"``, ``"feed_forward"``, ``"norm"`` or ``"post_blocks_norm"`` has biases."""
        own: bool | None = getattr(self, f"{part}_bias")
        if own is None and part == "post_blocks_norm":
            return self.has_bias("norm")
        return self.bias if own is None else own
