"""xLSTM (Beck et al. 2024, arXiv:2405.04517) and its 7B form (Beck et al. 2025, arXiv:2503.13427)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..errors import ConfigError
from ..kernels import MLSTMState, gated_norm, mlstm, slstm
from ..sequences import PackedBatch
from .backbone import Backbone, BackboneConfig
from .layers import (
    BlockLinear,
    CausalConvolution,
    FeedForward,
    HeadNorm,
    float32_linear,
    linear_in,
    linear_out,
    make_norm,
    round_up,
    soft_cap,
)
from .state import BackboneState, ConvolvedState

LAYOUTS = ("neurips", "7b")
DIRECTIONS = ("causal", "alternating", "bidirectional")
Hidden = Float[Tensor, "tokens channels"]


@dataclass(frozen=True)
class XLSTMConfig(BackboneConfig):
    """An xLSTM as plain values.

    Attributes:
        vocabulary_size: rows of the embedding; may be padded beyond the tokens there are.
        width: channels of the residual stream.
        depth: number of blocks.
        heads: heads of every cell.
        layout: of the mLSTM blocks. ``"neurips"``: LayerNorm, up-projection, convolution, block-diagonal q, k, v,
            learnable skip, gated down-projection. ``"7b"``: RMSNorm, plain q, k, v and output gate, soft-capped gates,
            then a SwiGLU.
        slstm_at: numbers, from 0, of the blocks that are sLSTM blocks (convolution, cell, then a gated GELU).
        direction: ``"causal"``; ``"alternating"``: odd blocks read right to left; ``"bidirectional"``: each cell reads
            both ways with the same weights, and the outputs are summed.
        expansion: inner width / width of a NeurIPS mLSTM block, rounded up to a multiple of 64.
        convolution: taps of the causal convolution.
        projection_block: block size of the block-diagonal q, k, v.
        qk_factor: width of q and k / width in the 7B layout.
        gate_cap: soft cap of the input and forget gate pre-activations in the 7B layout.
        feed_forward_width: inner width of the feed-forward; None: the published rule of the block it stands in.
        bias: biases on the linear maps of the mLSTM blocks.
        dropout: share of each block's output set to zero in training.
        norm_eps: of every norm; None: 1e-5 in the NeurIPS layout, 1e-6 in the 7B layout.
        post_blocks_norm: a norm after the last block.
    """

    family: ClassVar[str] = "xlstm"

    heads: int = 4
    layout: str = "neurips"
    slstm_at: tuple[int, ...] = ()
    direction: str = "causal"
    expansion: float | int = 2.0
    convolution: int = 4
    projection_block: int = 4
    qk_factor: float | int = 0.5
    gate_cap: float | int | None = 15.0
    feed_forward_width: int | None = None
    bias: bool = False
    dropout: float | int = 0.0
    norm_eps: float | int | None = None
    post_blocks_norm: bool = True

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ConfigError(f"layout is {self.layout!r}; it can be {' or '.join(LAYOUTS)}.")
        if self.direction not in DIRECTIONS:
            raise ConfigError(f"direction is {self.direction!r}; it can be {', '.join(DIRECTIONS)}.")
        for name in ("vocabulary_size", "width", "depth", "heads", "convolution", "projection_block"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        outside = [block for block in self.slstm_at if not 0 <= block < self.depth]
        if outside:
            raise ConfigError(f"slstm_at names blocks {outside}; there are blocks 0 to {self.depth - 1}.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout is {self.dropout}; it must be at least 0 and below 1.")
        for name, value, divisor in self._divisions():
            if value % divisor:
                raise ConfigError(f"The {name} {value} is not divisible by {divisor}.")

    def _divisions(self) -> list[tuple[str, int, int]]:
        """What must be divisible, by what: only of the blocks that there are."""
        divisions = []
        if self.slstm_at or self.layout == "7b":
            divisions.append(("width", self.width, self.heads))
        if len(set(self.slstm_at)) < self.depth:
            if self.layout == "7b":
                divisions.append(("width of q and k", self.qk_width, self.heads))
            else:
                divisions.append(("inner width", self.inner, self.heads))
                divisions.append(("inner width", self.inner, self.projection_block))
        return divisions

    @property
    def causal(self) -> bool:
        """Whether no token sees a later one."""
        return self.direction == "causal"

    @property
    def inner(self) -> int:
        """Width inside a NeurIPS mLSTM block."""
        return round_up(self.expansion * self.width, 64)

    @property
    def qk_width(self) -> int:
        """Width of all heads' q, and of k, in a 7B block."""
        return int(self.qk_factor * self.width)

    @property
    def eps(self) -> float | int:
        """Epsilon of every norm."""
        if self.norm_eps is not None:
            return self.norm_eps
        return 1e-5 if self.layout == "neurips" else 1e-6

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
        if self.direction == "bidirectional":
            return (False, True)
        return (self.direction == "alternating" and block % 2 == 1,)


class MLSTMBlock(nn.Module):
    """Pre-up-projection mLSTM block (Beck et al. 2024, figure 11): ``x + down(cell(conv(up norm x)) * SiLU(gate))``."""

    def __init__(self, config: XLSTMConfig, index: int) -> None:
        super().__init__()
        width, inner, heads = config.width, config.inner, config.heads
        blocks, block = inner // config.projection_block, config.projection_block
        self.heads, self.reverses = heads, config.reverses(index)
        self.decoding: Any = None  # what decoding.py knows of the parameters below
        self.norm = make_norm("layer", width, config.eps)
        self.up = linear_in(width, 2 * inner, bias=config.bias)
        self.convolution = CausalConvolution(inner, config.convolution)
        self.query_key = BlockLinear(2, blocks, block, init_width=width, bias=config.bias)
        self.value = BlockLinear(1, blocks, block, init_width=width, bias=config.bias)
        self.gates = gate_linear(3 * inner, heads)
        nn.init.normal_(self.gates.bias[:heads], std=0.1)
        self.head_norm = HeadNorm(heads, inner // heads, config.eps)
        self.skip = nn.Parameter(torch.ones(inner))
        self.down = linear_out(inner, width, config.depth, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Hidden, cu_seqlens: Int[Tensor, " boundaries"], state: ConvolvedState | None, return_state: bool
    ) -> tuple[Hidden, ConvolvedState | None]:
        """Return the residual stream after the block and, when asked, the block's state."""
        inner, gate = self.up(self.norm(x)).chunk(2, dim=-1)
        (v,) = self.value(inner)
        if len(self.reverses) == 1:
            read = partial(self._read, return_state=return_state, reverse=self.reverses[0])
            h, convolved, new = read(inner, v, cu_seqlens, state)
            norm = partial(gated_norm, skip=convolved, skip_weight=self.skip, eps=self.head_norm.eps)
            mixed = norm(h, self.head_norm.weight, gate)
        else:
            read = partial(self._read, inner, v, cu_seqlens, state, return_state=return_state)
            ways = [read(reverse=reverse) for reverse in self.reverses]
            skipped = [torch.addcmul(self.head_norm(h), self.skip, convolved) for h, convolved, _ in ways]
            mixed, new = summed(skipped) * F.silu(gate), ways[-1][2]
        return x + self.dropout(self.down(mixed)), new

    def _read(
        self,
        inner: Hidden,
        v: Hidden,
        cu_seqlens: Tensor,
        state: ConvolvedState | None,
        *,
        return_state: bool,
        reverse: bool,
    ) -> tuple[Float[Tensor, "tokens heads head_dim"], Hidden, ConvolvedState | None]:
        past = None if state is None else state.convolution
        convolved, last = self.convolution(inner, cu_seqlens, past, return_state=return_state, reverse=reverse)
        q, k = self.query_key(convolved)
        gates = self._gates(convolved, inner)
        cell = None if state is None else state.cell
        run = partial(run_mlstm, cu_seqlens=cu_seqlens, state=cell, return_state=return_state, reverse=reverse)
        h, after = run(q, k, v, gates, heads=self.heads)
        return h, convolved, ConvolvedState(after, last) if return_state else None

    def _gates(self, convolved: Hidden, inner: Hidden) -> Float[Tensor, "tokens gates"]:
        """The gates read q, k and v joined; those are linear in the two inputs here, so q, k and v are never joined."""
        bias: Tensor = self.gates.bias
        width = inner.shape[1]
        with torch.autocast(inner.device.type, enabled=False):
            weight = self.gates.weight.to(torch.promote_types(inner.dtype, torch.float32))
            after_qk, after_v = weight[:, : 2 * width], weight[:, 2 * width :]
            from_convolved, bias_qk = self.query_key.followed_by(after_qk)
            from_inner, bias_v = self.value.followed_by(after_v)
            if bias_qk is not None and bias_v is not None:
                bias = bias.to(weight.dtype) + bias_qk + bias_v
        return float32_linear(convolved, from_convolved, bias) + float32_linear(inner, from_inner, None)


class SLSTMBlock(nn.Module):
    """Post-up-projection sLSTM block (Beck et al. 2024, figure 10): ``x + cell(conv norm x)``, then ``x + ffn norm x``.

    The input and forget gates read the convolved input, the cell input and the output gate read it as it is.
    """

    def __init__(self, config: XLSTMConfig, index: int) -> None:
        super().__init__()
        width, heads, head_dim = config.width, config.heads, config.width // config.heads
        self.reverses = config.reverses(index)
        self.norm = make_norm("layer", width, config.eps)
        self.convolution = CausalConvolution(width, config.convolution)
        self.input_forget = BlockLinear(2, heads, head_dim, init_width=width)
        self.cell_output = BlockLinear(2, heads, head_dim, init_width=width)
        self.recurrent = nn.Parameter(torch.zeros(4, heads, head_dim, head_dim))
        self.bias = nn.Parameter(torch.zeros(4, heads, head_dim))
        # Forget gates spread by a power law over the units of a head, flatter from block to block.
        units = torch.arange(head_dim) / max(head_dim - 1, 1)
        power = 0.3 + 1.3 * index / max(config.depth - 1, 1)
        with torch.no_grad():
            self.bias[1] = 5 - 12 * units**power
        self.head_norm = HeadNorm(heads, head_dim, config.eps)
        self.feed_forward_norm = make_norm("layer", width, config.eps)
        self.feed_forward = FeedForward(width, config.gelu_width, config.depth, "geglu")
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Hidden, cu_seqlens: Int[Tensor, " boundaries"], state: ConvolvedState | None, return_state: bool
    ) -> tuple[Hidden, ConvolvedState | None]:
        """Return the residual stream after the block and, when asked, the block's state."""
        normed = self.norm(x)
        cell_output = self.cell_output(normed)
        mixed, new = [], None
        for reverse in self.reverses:
            h, new = self._read(normed, cell_output, cu_seqlens, state, return_state=return_state, reverse=reverse)
            mixed.append(h)
        x = x + summed(mixed)
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x))), new

    def _read(
        self,
        normed: Hidden,
        cell_output: tuple[Hidden, Hidden],
        cu_seqlens: Tensor,
        state: ConvolvedState | None,
        *,
        return_state: bool,
        reverse: bool,
    ) -> tuple[Hidden, ConvolvedState | None]:
        past = None if state is None else state.convolution
        convolved, last = self.convolution(normed, cu_seqlens, past, return_state=return_state, reverse=reverse)
        i, f = self.input_forget(convolved)
        gates = torch.stack((i, f, *cell_output), dim=1).view(-1, *self.bias.shape) + self.bias
        cell = None if state is None else state.cell
        run = partial(slstm, gates, self.recurrent, cu_seqlens=cu_seqlens, initial_state=cell, reverse=reverse)
        h, after = run(return_state=True) if return_state else (run(), None)
        return self.head_norm(self.dropout(h)), ConvolvedState(after, last) if return_state else None


class CappedMLSTMBlock(nn.Module):
    """xLSTM-7B block (Beck et al. 2025): ``x + out(sigmoid(gate) * cell(norm x))``, then ``x + swiglu(norm x)``."""

    def __init__(self, config: XLSTMConfig, index: int) -> None:
        super().__init__()
        width, heads, qk = config.width, config.heads, config.qk_width
        self.heads, self.reverses, self.cap = heads, config.reverses(index), config.gate_cap
        self.parts = (qk, qk, width, width)
        self.norm = make_norm("rms", width, config.eps)
        self.query_key_value_output = linear_in(width, sum(self.parts), bias=config.bias)
        self.gates = gate_linear(width, heads)
        nn.init.constant_(self.gates.bias[:heads], -10.0)
        self.head_norm = HeadNorm(heads, width // heads, config.eps)
        self.out = linear_out(width, width, config.depth, bias=config.bias)
        self.feed_forward_norm = make_norm("rms", width, config.eps)
        self.feed_forward = FeedForward(width, config.swiglu_width, config.depth, "swiglu", bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Hidden, cu_seqlens: Int[Tensor, " boundaries"], state: MLSTMState | None, return_state: bool
    ) -> tuple[Hidden, MLSTMState | None]:
        """Return the residual stream after the block and, when asked, the block's state."""
        normed = self.norm(x)
        q, k, v, o = self.query_key_value_output(normed).split(self.parts, dim=-1)
        gates = soft_cap(float32_linear(normed, self.gates.weight, self.gates.bias), self.cap)
        mixed, new = [], None
        for reverse in self.reverses:
            run = partial(run_mlstm, cu_seqlens=cu_seqlens, state=state, return_state=return_state, reverse=reverse)
            h, new = run(q, k, v, gates, heads=self.heads)
            mixed.append(self.head_norm(h))
        x = x + self.dropout(self.out(torch.sigmoid(o) * summed(mixed)))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x))), new


def gate_linear(width: int, heads: int) -> nn.Linear:
    """Return the map to the input gates (rows 0 to heads - 1) and forget gates: weights 0, forget biases 3 to 6."""
    linear = nn.Linear(width, 2 * heads)
    nn.init.zeros_(linear.weight)
    with torch.no_grad():
        linear.bias[heads:] = torch.linspace(3.0, 6.0, heads)
    return linear


def run_mlstm(
    q: Float[Tensor, "tokens qk_width"],
    k: Float[Tensor, "tokens qk_width"],
    v: Float[Tensor, "tokens v_width"],
    gates: Float[Tensor, "tokens gates"],
    *,
    heads: int,
    cu_seqlens: Int[Tensor, " boundaries"],
    state: MLSTMState | None,
    return_state: bool,
    reverse: bool,
) -> tuple[Float[Tensor, "tokens heads head_dim"], MLSTMState | None]:
    """Cut q, k, v and gates into heads and run the cell."""
    q, k, v = (part.reshape(len(part), heads, part.shape[1] // heads) for part in (q, k, v))
    i, f = gates.chunk(2, dim=-1)
    if return_state:
        return mlstm(q, k, v, i, f, cu_seqlens=cu_seqlens, initial_state=state, reverse=reverse, return_state=True)
    return mlstm(q, k, v, i, f, cu_seqlens=cu_seqlens, initial_state=state, reverse=reverse), None


def summed(parts: list[Tensor]) -> Tensor:
    """Return the sum of one or two tensors."""
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


class XLSTM(Backbone):
    """The network of an ``XLSTMConfig``."""

    def __init__(self, config: XLSTMConfig) -> None:
        super().__init__(config)
        mlstm_block = MLSTMBlock if config.layout == "neurips" else CappedMLSTMBlock
        self.blocks = nn.ModuleList(
            SLSTMBlock(config, i) if i in config.slstm_at else mlstm_block(config, i) for i in range(config.depth)
        )
        kind = "layer" if config.layout == "neurips" else "rms"
        self.norm = make_norm(kind, config.width, config.eps) if config.post_blocks_norm else nn.Identity()

    def context(
        self, batch: PackedBatch, state: BackboneState | None, *, reuse_state: bool = False
    ) -> Int[Tensor, " boundaries"]:
        """Return the sequence boundaries: order is all that an xLSTM knows of positions."""
        return batch.cu_seqlens
