"""The configuration of an xLSTM."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ..errors import ConfigError
from .backbone import BackboneConfig
from .layers import round_up

KINDS = ("mlstm", "slstm", "mlstm-7b")
DIRECTIONS = ("causal", "alternating", "alternating-first", "bidirectional", "tied")
POSITIONS = (None, "sinusoidal")
ROTARY = (None, "width", "head")


@dataclass(frozen=True)
class XLSTMConfig(BackboneConfig):
    """An xLSTM as plain values.

    Attributes:
        vocabulary_size: rows of the embedding; may be padded beyond the tokens there are.
        width: channels of the residual stream.
        depth: number of blocks.
        complement: see ``BackboneConfig``.
        heads: heads of every cell.
        blocks: kind of all blocks, or of each. ``"mlstm"``: LayerNorm, up-projection, convolution, block-diagonal q, k,
            v, learnable skip, gated down-projection. ``"slstm"``: LayerNorm, convolution, cell, then a gated GELU.
            ``"mlstm-7b"``: RMSNorm, plain q, k, v and output gate, soft-capped gates, then a SwiGLU. The norm behind
            the last block is an RMSNorm where every block is an ``"mlstm-7b"``, and else a LayerNorm.
        direction: ``"causal"``; ``"alternating"``: odd blocks read right to left, the second being the first of them;
            ``"alternating-first"`` (DNA-xLSTM): even blocks do, from the first on; ``"bidirectional"``: each cell reads
            both ways with the same weights, and the outputs are summed; ``"tied"`` (DNA-xLSTM): each block, residual
            and feed-forward included, reads both ways with the same weights, and the outputs are summed.
        expansion: inner width / width of an ``"mlstm"`` block, of all or of each, rounded up to a multiple of 64.
        convolution: taps of the causal convolution.
        projection_block: block size of the block-diagonal q, k, v.
        positions: what is added to the embeddings: nothing, or ``"sinusoidal"`` (DNA-xLSTM): sines and then cosines of
            the batch's ``positions``, with base 100,000, all times one learned scale.
        rotary: rotary positions (interleaved) of q and k in ``"mlstm"`` blocks; they are the batch's ``positions``,
            from the last to the first where a block reads right to left. ``"width"`` (Prot-xLSTM): over all heads as
            one vector, and seen by the gates; ``"head"`` (DNA-xLSTM): each head by itself, and not seen by the gates.
        rotary_base: of the rotary positions.
        qk_factor: width of q and k / width in an ``"mlstm-7b"`` block.
        gate_cap: soft cap of the input and forget gate pre-activations in an ``"mlstm-7b"`` block.
        feed_forward_width: inner width of the feed-forward; None: the published rule of the block it stands in.
        bias: biases on the linear maps of the mLSTM blocks.
        dropout: share of each block's output set to zero in training.
        norm_eps: of every norm; None: 1e-6 in ``"mlstm-7b"`` blocks and behind nothing but such, else 1e-5.
        norm_offset: the weights of all norms are stored minus one, as the package ``xlstm`` has them.
        post_blocks_norm: a norm after the last block.
        legacy_head_flip: sLSTM cells on the other strand have their heads in reverse order before their norm and after,
            as in the released code of DNA-xLSTM. Its checkpoints with ``complement`` need it; it is a mistake, which
            makes the network not equivariant.
    """

    family: ClassVar[str] = "xlstm"

    heads: int = 4
    blocks: str | tuple[str, ...] = "mlstm"
    direction: str = "causal"
    expansion: float | int | tuple[float | int, ...] = 2.0
    convolution: int = 4
    projection_block: int = 4
    positions: str | None = None
    rotary: str | None = None
    rotary_base: float | int = 500000.0
    qk_factor: float | int = 0.5
    gate_cap: float | int | None = 15.0
    feed_forward_width: int | None = None
    bias: bool = False
    dropout: float | int = 0.0
    norm_eps: float | int | None = None
    norm_offset: bool = False
    post_blocks_norm: bool = True
    legacy_head_flip: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in (("direction", DIRECTIONS), ("positions", POSITIONS), ("rotary", ROTARY)):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it can be {', '.join(map(str, allowed))}.")
        for name in ("vocabulary_size", "width", "depth", "heads", "convolution", "projection_block"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        for name, values in (("blocks", self.kinds), ("expansion", self.expansions)):
            if len(values) != self.depth:
                raise ConfigError(f"{name} has {len(values)} entries; there are {self.depth} blocks.")
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown:
            raise ConfigError(f"blocks has {unknown[0]!r}; a block can be {', '.join(KINDS)}.")
        if min(self.expansions) <= 0:
            raise ConfigError(f"expansion is {min(self.expansions)}; it must be positive.")
        if self.rotary_base <= 0:
            raise ConfigError(f"rotary_base is {self.rotary_base}; it must be positive.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout is {self.dropout}; it must be at least 0 and below 1.")
        if self.legacy_head_flip and (self.complement is None or "slstm" not in self.kinds):
            raise ConfigError("legacy_head_flip is of sLSTM blocks in a network with a complement.")
        for name, value, divisor in self._divisions():
            if value % divisor:
                raise ConfigError(f"The {name} {value} is not divisible by {divisor}.")

    def _divisions(self) -> list[tuple[str, int, int]]:
        """What must be divisible, by what: only of the blocks that there are."""
        divisions = []
        if self.positions is not None:
            divisions.append(("width", self.width, 2))
        if set(self.kinds) != {"mlstm"}:
            divisions.append(("width", self.width, self.heads))
        if "mlstm-7b" in self.kinds:
            divisions.append(("width of q and k", self.qk_width, self.heads))
        for block in (i for i, kind in enumerate(self.kinds) if kind == "mlstm"):
            pairs = 2 if self.rotary == "head" else 1  # the inner width is even
            divisions.append(("inner width", self.inner_width(block), self.heads * pairs))
            divisions.append(("inner width", self.inner_width(block), self.projection_block))
        return divisions

    @property
    def causal(self) -> bool:
        """Whether no token sees a later one."""
        return self.direction == "causal" and self.complement is None

    @property
    def positional(self) -> bool:
        """Whether the positions of a batch change what the network gives."""
        return self.positions is not None or (self.rotary is not None and "mlstm" in self.kinds)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kind of each block."""
        return (self.blocks,) * self.depth if isinstance(self.blocks, str) else self.blocks

    @property
    def expansions(self) -> tuple[float | int, ...]:
        """Inner width / width of each block, where it is an ``"mlstm"``."""
        return self.expansion if isinstance(self.expansion, tuple) else (self.expansion,) * self.depth

    def inner_width(self, block: int) -> int:
        """Return the width inside an ``"mlstm"`` block."""
        return round_up(self.expansions[block] * self.width, 64)

    @property
    def qk_width(self) -> int:
        """Width of all heads' q, and of k, in a 7B block."""
        return int(self.qk_factor * self.width)

    def eps(self, kind: str) -> float | int:
        """Return the epsilon of the norms in blocks of a kind."""
        if self.norm_eps is not None:
            return self.norm_eps
        return 1e-6 if kind == "mlstm-7b" else 1e-5

    @property
    def gelu_width(self) -> int:
        """Inner width of an sLSTM block's feed-forward: 1.3 of the width, up to a multiple of 64 (Beck et al. 2024)."""
        return self.feed_forward_width or round_up(1.3 * self.width, 64)

    @property
    def swiglu_width(self) -> int:
        """Inner width of a 7B block's feed-forward: 2.667 of the width, up to a multiple of 64 (Beck et al. 2025)."""
        return self.feed_forward_width or math.floor((2.667 * self.width + 63) / 64) * 64

    def reverses(self, block: int) -> tuple[bool, ...]:
        """Return the directions in which a block reads, True for right to left."""
        if self.direction in ("bidirectional", "tied"):
            return (False, True)
        return ({"alternating": 1, "alternating-first": 0}.get(self.direction) == block % 2,)
