"""Layers that the networks share: norms, feed-forward, block-diagonal maps, causal convolution, initialisation."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..errors import ConfigError
from ..kernels import causal_conv1d, linear_rows

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"swiglu": F.silu, "geglu": F.gelu, "gelu": F.gelu}
GATED = ("swiglu", "geglu")
MERGED_BLOCK = 16


def round_up(value: float | int, multiple: int) -> int:
    """Return the smallest multiple of ``multiple`` that is at least ``value``."""
    return math.ceil(value / multiple) * multiple


@torch.no_grad()
def small_init_(weight: Tensor, width: int) -> None:
    """Draw a map that reads the residual stream: N(0, 2 / (5 width)) (Nguyen & Salazar 2019)."""
    weight.normal_(0.0, math.sqrt(2 / (5 * width)))


@torch.no_grad()
def wang_init_(weight: Tensor, width: int, depth: int) -> None:
    """Draw a map that writes to the residual stream of ``depth`` blocks: N(0, (2 / (depth sqrt(width)))^2)."""
    weight.normal_(0.0, 2 / (depth * math.sqrt(width)))


def apply_linear(
    x: Float[Tensor, "tokens inputs"], weight: Float[Tensor, "outputs inputs"], bias: Float[Tensor, " outputs"] | None
) -> Float[Tensor, "tokens outputs"]:
    """Linear map, also by a weight narrower than ``x`` (see ``models.load``)."""
    if weight.dtype == x.dtype or torch.is_autocast_enabled(x.device.type):
        return F.linear(x, weight, bias)
    return linear_rows(x, weight, bias)


class Linear(nn.Linear):
    """``nn.Linear`` by ``apply_linear``."""

    def forward(self, input: Float[Tensor, "tokens inputs"]) -> Float[Tensor, "tokens outputs"]:
        """Map each token."""
        return apply_linear(input, self.weight, self.bias)


def linear_in(width: int, out: int, *, bias: bool) -> Linear:
    """Return a linear map from the residual stream, small initialisation, bias zero."""
    linear = Linear(width, out, bias=bias)
    small_init_(linear.weight, width)
    if bias:
        nn.init.zeros_(linear.bias)
    return linear


def linear_out(inner: int, width: int, depth: int, *, bias: bool) -> Linear:
    """Return a linear map to the residual stream, Wang initialisation, bias zero."""
    linear = Linear(inner, width, bias=bias)
    wang_init_(linear.weight, width, depth)
    if bias:
        nn.init.zeros_(linear.bias)
    return linear


def make_norm(kind: str, width: int, eps: float | int, *, bias: bool = False) -> nn.Module:
    """Return a LayerNorm (``"layer"``) or RMSNorm (``"rms"``, which has no bias) with effective weight one.

    Raises:
        ConfigError: another kind.
    """
    if kind == "layer":
        return nn.LayerNorm(width, eps, bias=bias)
    if kind == "rms":
        return nn.RMSNorm(width, eps)
    raise ConfigError(f"No norm is called {kind!r}: 'layer' or 'rms'.")


def soft_cap(x: Float[Tensor, "*shape"], cap: float | int | None) -> Float[Tensor, "*shape"]:
    """Return ``cap * tanh(x / cap)``, or ``x`` where ``cap`` is None."""
    return x if cap is None else cap * torch.tanh(x / cap)


def float32_linear(
    x: Float[Tensor, "tokens width"], weight: Float[Tensor, "out width"], bias: Float[Tensor, " out"] | None
) -> Float[Tensor, "tokens out"]:
    """Linear map in at least float32 whatever the dtype around it: gate pre-activations are summed over a sequence."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


class HeadNorm(nn.Module):
    """LayerNorm over each head by itself, with one weight per channel and no bias."""

    def __init__(self, heads: int, head_dim: int, eps: float | int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads, head_dim))
        self.eps = eps

    def forward(self, x: Float[Tensor, "tokens heads head_dim"]) -> Float[Tensor, "tokens width"]:
        """Normalise and join the heads."""
        if len(self.weight) == 1:
            return F.layer_norm(x, x.shape[2:], self.weight[0], eps=self.eps).flatten(1)
        return (F.layer_norm(x, x.shape[2:], eps=self.eps) * self.weight.to(x.dtype)).flatten(1)


class BlockLinear(nn.Module):
    """Block-diagonal maps of one input, weight [maps, blocks, out, in]; the channels of a block lie side by side."""

    def __init__(self, maps: int, blocks: int, block: int, *, init_width: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(maps, blocks, block, block))
        self.bias = nn.Parameter(torch.zeros(maps, blocks, block)) if bias else None
        small_init_(self.weight, init_width)

    def forward(self, x: Float[Tensor, "tokens width"]) -> tuple[Float[Tensor, "tokens width"], ...]:
        """Return one output per map."""
        weight = self._merged()
        blocks = weight.shape[1]
        out = torch.einsum("tbi,mboi->tmbo", x.view(len(x), blocks, x.shape[1] // blocks), weight).flatten(2)
        if self.bias is not None:
            out = out + self.bias.flatten(1).to(out.dtype)
        return out.unbind(1)

    def _merged(self) -> Float[Tensor, "maps blocks out in"]:
        """Neighbouring blocks as one, zeros between them: products of 16 channels run three times as fast as of 4."""
        maps, blocks, block, _ = self.weight.shape
        merge = math.gcd(blocks, max(MERGED_BLOCK // block, 1))
        if merge == 1:
            return self.weight
        grouped = self.weight.view(maps, blocks // merge, merge, block, 1, block)
        diagonal = torch.eye(merge, dtype=grouped.dtype, device=grouped.device).view(merge, 1, merge, 1)
        return (grouped * diagonal).reshape(maps, blocks // merge, merge * block, merge * block)

    def followed_by(
        self, weight: Float[Tensor, "out joined"]
    ) -> tuple[Float[Tensor, "out width"], Float[Tensor, " out"] | None]:
        """Return as one map of the input (weight, bias): these maps, their outputs joined, and then ``weight``."""
        after = weight.reshape(len(weight), *self.weight.shape[:3])
        bias = None if self.bias is None else torch.einsum("nmbo,mbo->n", after, self.bias.to(after.dtype))
        return torch.einsum("nmbo,mboi->nbi", after, self.weight.to(after.dtype)).flatten(1), bias


class FeedForward(nn.Module):
    """Two-layer perceptron: ``down(act(up x))``, or gated ``down(act(gate x) * up x)`` with gate and up in one map."""

    def __init__(self, width: int, inner: int, depth: int, activation: str, *, bias: bool = False) -> None:
        super().__init__()
        self.activation = activation
        self.up = linear_in(width, inner * (2 if activation in GATED else 1), bias=bias)
        self.down = linear_out(inner, width, depth, bias=bias)

    def forward(self, x: Float[Tensor, "tokens width"]) -> Float[Tensor, "tokens width"]:
        """Apply to each token."""
        act, inner = ACTIVATIONS[self.activation], self.up(x)
        if self.activation in GATED:
            gate, up = inner.chunk(2, dim=-1)
            inner = act(gate) * up
        else:
            inner = act(inner)
        out: Tensor = self.down(inner)
        return out


class CausalConvolution(nn.Module):
    """Depthwise causal convolution with bias; never reaches over a sequence's edge."""

    def __init__(self, channels: int, taps: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(taps)
        self.weight = nn.Parameter(torch.empty(channels, taps).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(channels).uniform_(-bound, bound))

    def forward(
        self,
        x: Float[Tensor, "tokens channels"],
        cu_seqlens: Int[Tensor, " boundaries"],
        state: Float[Tensor, "sequences past channels"] | None,
        *,
        return_state: bool,
        reverse: bool,
    ) -> tuple[Float[Tensor, "tokens channels"], Float[Tensor, "sequences past channels"] | None]:
        """Return the convolved tokens and, when asked, the last ``taps - 1`` inputs of each sequence."""
        weight, bias = self.weight, self.bias
        if return_state:
            return causal_conv1d(
                x, weight, bias, cu_seqlens=cu_seqlens, initial_state=state, reverse=reverse, return_state=True
            )
        return causal_conv1d(x, weight, bias, cu_seqlens=cu_seqlens, initial_state=state, reverse=reverse), None
