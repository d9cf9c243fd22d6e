"""The blocks of an xLSTM: mLSTM, sLSTM, and the mLSTM block of xLSTM-7B."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..kernels import MLSTMState, gated_norm, mlstm, rotary, slstm
from ..sequences import SequenceShare
from .layers import (
    BlockLinear,
    CausalConvolution,
    FeedForward,
    HeadNorm,
    added,
    float32_linear,
    linear_in,
    linear_out,
    make_norm,
    soft_cap,
)
from .sequence_parallel import share_of_heads, with_all_tokens
from .state import ConvolvedState
from .xlstm_config import XLSTMConfig

Hidden = Float[Tensor, "tokens channels"]


class Context(NamedTuple):
    """What a block needs to know of a batch.

    Attributes:
        cu_seqlens: boundaries of the sequences.
        positions: of the tokens, for rotary positions.
        backwards: positions of the tokens when they are read right to left.
        share: which of the tokens this process has, where several share the batch.
    """

    cu_seqlens: Int[Tensor, " boundaries"]
    positions: Int[Tensor, " tokens"]
    backwards: Int[Tensor, " tokens"]
    share: SequenceShare | None = None


class MLSTMBlock(nn.Module):
    """Pre-up-projection mLSTM block (Beck et al. 2024, figure 11): ``x + down(cell(conv(up norm x)) * SiLU(gate))``."""

    def __init__(self, config: XLSTMConfig, index: int) -> None:
        super().__init__()
        width, inner, heads, offset = config.width, config.inner_width(index), config.heads, config.norm_offset
        blocks, block, eps = inner // config.projection_block, config.projection_block, config.eps("mlstm")
        self.heads, self.reverses, self.tied = heads, config.reverses(index), config.direction == "tied"
        self.rotary, self.rotary_base = config.rotary, config.rotary_base
        self.decoding: Any = None  # what decoding.py knows of the parameters below
        self.norm = make_norm("layer", width, eps, offset=offset)
        self.up = linear_in(width, 2 * inner, bias=config.bias)
        self.convolution = CausalConvolution(inner, config.convolution)
        self.query_key = BlockLinear(2, blocks, block, init_width=width, bias=config.bias)
        self.value = BlockLinear(1, blocks, block, init_width=width, bias=config.bias)
        self.gates = gate_linear(3 * inner, heads)
        nn.init.normal_(self.gates.bias[:heads], std=0.1)
        self.head_norm = HeadNorm(heads, inner // heads, eps, offset=offset)
        self.skip = nn.Parameter(torch.ones(inner))
        self.down = linear_out(inner, width, config.depth, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Hidden, context: Context, state: ConvolvedState | None, return_state: bool
    ) -> tuple[Hidden, ConvolvedState | None]:
        """Return the residual stream after the block and, when asked, the block's state."""
        inner, gate = self.up(self.norm(x)).chunk(2, dim=-1)
        (v,) = self.value(inner)
        if len(self.reverses) == 1:
            read = partial(self._read, return_state=return_state, reverse=self.reverses[0])
            h, convolved, new = read(inner, v, context, state)
            norm = partial(gated_norm, skip=convolved, skip_weight=self.skip, eps=self.head_norm.eps)
            mixed = norm(h, self.head_norm.scale, gate)
        else:
            read = partial(self._read, inner, v, context, state, return_state=return_state)
            ways = [read(reverse=reverse) for reverse in self.reverses]
            skipped = [torch.addcmul(self.head_norm(h), self.skip, convolved) for h, convolved, _ in ways]
            mixed, new = summed(skipped) * F.silu(gate), ways[-1][2]
        if not self.tied:
            dropped = self.training and self.dropout.p
            return x + self.dropout(self.down(mixed)) if dropped else added(self.down, mixed, x), new
        out = self.down(mixed)  # behind the cells all is linear: only the residual and the bias come twice
        return 2 * x + self.dropout(out if self.down.bias is None else out + self.down.bias), new

    def _read(
        self,
        inner: Hidden,
        v: Hidden,
        context: Context,
        state: ConvolvedState | None,
        *,
        return_state: bool,
        reverse: bool,
    ) -> tuple[Float[Tensor, "tokens heads head_dim"], Hidden, ConvolvedState | None]:
        past, cu_seqlens, share = None if state is None else state.convolution, context.cu_seqlens, context.share
        convolve = partial(self.convolution, return_state=return_state, reverse=reverse, share=share)
        convolved, last = convolve(inner, cu_seqlens, past)
        q, k = self.query_key(convolved)
        if self.rotary is None:
            gates = self._gates(convolved, inner)
        else:
            at = context.backwards if reverse else context.positions
            turned = [self._turn(part, at) for part in (q, k)]
            seen = torch.cat(turned, dim=-1) if self.rotary == "width" else None
            gates, (q, k) = self._gates(convolved, inner, seen), turned
        cell = None if state is None else state.cell
        run = partial(run_mlstm, context=context, state=cell, return_state=return_state, reverse=reverse)
        h, after = run(q, k, v, gates, heads=self.heads)
        return h, convolved, ConvolvedState(after, last) if return_state else None

    def _turn(self, x: Hidden, positions: Int[Tensor, " tokens"]) -> Hidden:
        heads = 1 if self.rotary == "width" else self.heads
        parts = x.reshape(len(x), heads, x.shape[1] // heads)
        return rotary(parts, positions, base=self.rotary_base, style="interleaved").flatten(1)

    def _gates(
        self, convolved: Hidden, inner: Hidden, query_key: Float[Tensor, "tokens joined"] | None = None
    ) -> Float[Tensor, "tokens gates"]:
        """The gates read q, k and v joined; those are linear in the two inputs here, so q, k and v are never joined.

        ``query_key`` are q and k joined where the gates read something else than the linear maps give.
        """
        bias: Tensor = self.gates.bias
        width = inner.shape[1]
        with torch.autocast(inner.device.type, enabled=False):
            weight = self.gates.weight.to(torch.promote_types(inner.dtype, torch.float32))
            after_qk, after_v = weight[:, : 2 * width], weight[:, 2 * width :]
            from_inner, bias_v = self.value.followed_by(after_v)
            bias = bias if bias_v is None else bias.to(weight.dtype) + bias_v
            if query_key is None:
                after_qk, bias_qk = self.query_key.followed_by(after_qk)
                bias = bias if bias_qk is None else bias + bias_qk
        read = convolved if query_key is None else query_key
        return float32_linear(read, after_qk, bias) + float32_linear(inner, from_inner, None)


class SLSTMBlock(nn.Module):
    """Post-up-projection sLSTM block (Beck et al. 2024, figure 10): ``x + cell(conv norm x)``, then ``x + ffn norm x``.

    The input and forget gates read the convolved input, the cell input and the output gate read it as it is.
    """

    def __init__(self, config: XLSTMConfig, index: int) -> None:
        super().__init__()
        width, heads, head_dim = config.width, config.heads, config.width // config.heads
        eps, offset = config.eps("slstm"), config.norm_offset
        self.reverses, self.tied = config.reverses(index), config.direction == "tied"
        self.legacy_head_flip = config.legacy_head_flip
        self.norm = make_norm("layer", width, eps, offset=offset)
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
        self.head_norm = HeadNorm(heads, head_dim, eps, offset=offset)
        self.feed_forward_norm = make_norm("layer", width, eps, offset=offset)
        self.feed_forward = FeedForward(width, config.gelu_width, config.depth, "geglu")
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Hidden, context: Context, state: ConvolvedState | None, return_state: bool
    ) -> tuple[Hidden, ConvolvedState | None]:
        """Return the residual stream after the block and, when asked, the block's state."""
        normed = self.norm(x)
        cell_output = self.cell_output(normed)
        mixed, new = [], None
        for reverse in self.reverses:
            h, new = self._read(normed, cell_output, context, state, return_state=return_state, reverse=reverse)
            mixed.append(h)
        return summed([self._fed(x + part) for part in (mixed if self.tied else [summed(mixed)])]), new

    def _fed(self, x: Hidden) -> Hidden:
        out: Tensor = self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        return x + out

    def _read(
        self,
        normed: Hidden,
        cell_output: tuple[Hidden, Hidden],
        context: Context,
        state: ConvolvedState | None,
        *,
        return_state: bool,
        reverse: bool,
    ) -> tuple[Hidden, ConvolvedState | None]:
        past, cu_seqlens, share = None if state is None else state.convolution, context.cu_seqlens, context.share
        convolve = partial(self.convolution, return_state=return_state, reverse=reverse, share=share)
        convolved, last = convolve(normed, cu_seqlens, past)
        i, f = self.input_forget(convolved)
        gates = torch.stack((i, f, *cell_output), dim=1).view(-1, *self.bias.shape) + self.bias
        cell = None if state is None else state.cell
        run = partial(slstm, cu_seqlens=cu_seqlens, initial_state=cell, reverse=reverse)
        if share is not None:
            recurrent = self.recurrent[:, share_of_heads(share, self.recurrent.shape[1])]
            by_head = gates.transpose(1, 2)
            h, after = with_all_tokens(share, lambda some: run(some.transpose(1, 2), recurrent), by_head), None
        elif return_state:
            h, after = run(gates, self.recurrent, return_state=True)
        else:
            h, after = run(gates, self.recurrent), None
        if self.legacy_head_flip:  # the other strands are the second half of the batch
            here, there = h.chunk(2)
            h = torch.cat((here, there.flip(1)))
        return self.head_norm(self.dropout(h)), ConvolvedState(after, last) if return_state else None


class CappedMLSTMBlock(nn.Module):
    """xLSTM-7B block (Beck et al. 2025): ``x + out(sigmoid(gate) * cell(norm x))``, then ``x + swiglu(norm x)``."""

    def __init__(self, config: XLSTMConfig, index: int) -> None:
        super().__init__()
        width, heads, qk = config.width, config.heads, config.qk_width
        eps, offset = config.eps("mlstm-7b"), config.norm_offset
        self.heads, self.cap = heads, config.gate_cap
        self.decoding: Any = None  # what decoding.py knows of the parameters below
        self.reverses, self.tied = config.reverses(index), config.direction == "tied"
        self.parts = (qk, qk, width, width)
        self.norm = make_norm("rms", width, eps, offset=offset)
        self.query_key_value_output = linear_in(width, sum(self.parts), bias=config.bias)
        self.gates = gate_linear(width, heads)
        nn.init.constant_(self.gates.bias[:heads], -10.0)
        self.head_norm = HeadNorm(heads, width // heads, eps, offset=offset)
        self.out = linear_out(width, width, config.depth, bias=config.bias)
        self.feed_forward_norm = make_norm("rms", width, eps, offset=offset)
        self.feed_forward = FeedForward(width, config.swiglu_width, config.depth, "swiglu", bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Hidden, context: Context, state: MLSTMState | None, return_state: bool
    ) -> tuple[Hidden, MLSTMState | None]:
        """Return the residual stream after the block and, when asked, the block's state."""
        normed = self.norm(x)
        q, k, v, o = self.query_key_value_output(normed).split(self.parts, dim=-1)
        gates = soft_cap(float32_linear(normed, self.gates.weight, self.gates.bias), self.cap)
        run = partial(run_mlstm, context=context, state=state, return_state=return_state)
        if len(self.reverses) == 1:
            h, new = run(q, k, v, gates, heads=self.heads, reverse=self.reverses[0])
            norm = self.head_norm
            return self._fed(x, gated_norm(h, norm.scale, o, activation="sigmoid", eps=norm.eps)), new
        mixed, new = [], None
        for reverse in self.reverses:
            h, new = run(q, k, v, gates, heads=self.heads, reverse=reverse)
            mixed.append(self.head_norm(h))
        gate = torch.sigmoid(o)
        return summed([self._fed(x, gate * part) for part in (mixed if self.tied else [summed(mixed)])]), new

    def _fed(self, x: Hidden, mixed: Hidden) -> Hidden:
        if self.training and self.dropout.p:
            x = x + self.dropout(self.out(mixed))
            out: Tensor = self.dropout(self.feed_forward(self.feed_forward_norm(x)))
            return x + out
        x = added(self.out, mixed, x)
        fed: Hidden = self.feed_forward(self.feed_forward_norm(x), x)
        return fed


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
    context: Context,
    state: MLSTMState | None,
    return_state: bool,
    reverse: bool,
) -> tuple[Float[Tensor, "tokens heads head_dim"], MLSTMState | None]:
    """Cut q, k, v and gates into heads and run the cell."""
    q, k, v = (part.reshape(len(part), heads, part.shape[1] // heads) for part in (q, k, v))
    i, f = gates.chunk(2, dim=-1)
    cu_seqlens = context.cu_seqlens
    if return_state:
        return mlstm(q, k, v, i, f, cu_seqlens=cu_seqlens, initial_state=state, reverse=reverse, return_state=True)
    run = partial(mlstm, cu_seqlens=cu_seqlens, initial_state=state, reverse=reverse)
    return with_all_tokens(context.share, run, q, k, v, i, f), None


def summed(parts: list[Tensor]) -> Tensor:
    """Return the sum of one or two tensors."""
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]
