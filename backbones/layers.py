"""Layers that the networks share: norms, feed-forward, block-diagonal maps, causal convolution, initialisation."""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..errors import ConfigError
from ..kernels import activation as apply_activation
from ..kernels import block_linear, causal_conv1d, fused_linear, head_norm, linear, linear_rows, rms_norm
from ..kernels.rows import FEW
from ..sequences import SequenceShare
from .sequence_parallel import with_neighbours

ACTIVATIONS = ("swiglu", "geglu", "gelu", "relu")
GATED = ("swiglu", "geglu")


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
    x: Float[Tensor, "tokens inputs"],
    weight: Float[Tensor, "outputs inputs"],
    bias: Float[Tensor, " outputs"] | None,
    *,
    activation: str | None = None,
    residual: Float[Tensor, "tokens outputs"] | None = None,
) -> Float[Tensor, "tokens outputs"]:
    """``act(x W^T + bias) + residual`` by the fastest path, also by a weight narrower than ``x`` (see ``models.load``).

    On a CPU autocast to bfloat16 means bfloat16 operands and float32 results.
    """
    autocast = torch.is_autocast_enabled(x.device.type)
    if x.is_cpu and not autocast and weight.dtype in (x.dtype, torch.bfloat16):
        if len(x) > FEW:
            return fused_linear(x, weight, bias, activation=activation, residual=residual)
        if activation is None and not torch.is_grad_enabled():
            return linear_rows(x, weight, bias, residual=residual)
    y = _mapped(x, weight, bias, autocast=autocast)
    y = y if activation is None else apply_activation(y, activation)
    return y if residual is None else residual + y


def attention_precision(x: Float[Tensor, "tokens inputs"], weight: Float[Tensor, "outputs inputs"]) -> str:
    """The ``precision`` of attention in inference mode: that in which ``apply_linear`` multiplies ``x`` and ``weight``.

    Elsewhere it is float32: what training reads ahead without gradients is what it reads again with them.
    """
    if not torch.is_inference_mode_enabled():
        return "float32"
    if torch.is_autocast_enabled(x.device.type):
        return "bf16" if torch.get_autocast_dtype(x.device.type) == torch.bfloat16 else "float32"
    return "bf16" if weight.dtype == torch.bfloat16 else "float32"


def _mapped(x: Tensor, weight: Tensor, bias: Tensor | None, *, autocast: bool) -> Tensor:
    if weight.dtype != x.dtype and not autocast:
        return linear_rows(x, weight, bias)
    if x.device.type != "cpu":
        return F.linear(x, weight, bias)
    if not autocast:
        return linear(x, weight, bias)
    if weight.dtype != torch.float32 or torch.get_autocast_dtype("cpu") != torch.bfloat16:
        return F.linear(x, weight, bias)
    return linear(x.float(), weight, bias, precision="bf16")


class Linear(nn.Linear):
    """``nn.Linear`` by ``apply_linear``."""

    def forward(
        self,
        input: Float[Tensor, "tokens inputs"],
        *,
        activation: str | None = None,
        residual: Float[Tensor, "tokens outputs"] | None = None,
    ) -> Float[Tensor, "tokens outputs"]:
        """Map each token; ``activation`` and ``residual`` are what comes behind, done at once where that is quicker."""
        return apply_linear(input, self.weight, self.bias, activation=activation, residual=residual)


def activated(x: Float[Tensor, "tokens channels"], kind: str) -> Float[Tensor, "tokens inner"]:
    """Return the activation of ``x``, one of ``ACTIVATIONS``."""
    return F.relu(x) if kind == "relu" else apply_activation(x, kind)


def added(layer: nn.Module, x: Float[Tensor, "tokens inputs"], residual: Float[Tensor, "tokens outputs"]) -> Tensor:
    """Return ``residual + layer(x)``, at once where ``layer`` is a linear map as it stands and no adapter of one."""
    y: Tensor = layer(x, residual=residual) if type(layer) is Linear else residual + layer(x)
    return y


def linear_in(width: int, out: int, *, bias: bool) -> Linear:
    """Return a linear map from the residual stream, small initialisation, bias zero."""
    layer = Linear(width, out, bias=bias)
    small_init_(layer.weight, width)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def linear_out(inner: int, width: int, depth: int, *, bias: bool) -> Linear:
    """Return a linear map to the residual stream, Wang initialisation, bias zero."""
    layer = Linear(inner, width, bias=bias)
    wang_init_(layer.weight, width, depth)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


class OffsetLayerNorm(nn.LayerNorm):
    """A LayerNorm whose weight is stored minus one."""

    def reset_parameters(self) -> None:
        """Set the effective weight to one and the bias to zero."""
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Float[Tensor, "tokens width"]) -> Float[Tensor, "tokens width"]:
        """Normalise each token."""
        return F.layer_norm(input, self.normalized_shape, self.weight + 1, self.bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """``nn.RMSNorm`` by the quickest kernel."""

    def forward(self, x: Float[Tensor, "*tokens width"]) -> Float[Tensor, "*tokens width"]:
        """Normalise each token."""
        return rms_norm(x, self.weight, self.eps or 0.0)


class OffsetRMSNorm(nn.RMSNorm):
    """An RMSNorm whose weight is stored minus one."""

    def reset_parameters(self) -> None:
        """Set the effective weight to one."""
        nn.init.zeros_(self.weight)

    def forward(self, x: Float[Tensor, "tokens width"]) -> Float[Tensor, "tokens width"]:
        """Normalise each token."""
        return rms_norm(x, self.weight + 1, self.eps or 0.0)


def make_norm(kind: str, width: int, eps: float | int, *, bias: bool = False, offset: bool = False) -> nn.Module:
    """Return a LayerNorm (``"layer"``) or RMSNorm (``"rms"``, which has no bias) with effective weight one.

    With ``offset`` the weight is stored minus one.

    Raises:
        ConfigError: another kind.
    """
    if kind == "layer":
        return (OffsetLayerNorm if offset else nn.LayerNorm)(width, eps, bias=bias)
    if kind == "rms":
        return (OffsetRMSNorm if offset else RMSNorm)(width, eps)
    raise ConfigError(f"No norm is called {kind!r}: 'layer' or 'rms'.")


def soft_cap(x: Float[Tensor, "*shape"], cap: float | int | None) -> Float[Tensor, "*shape"]:
    """Return ``cap * tanh(x / cap)``, or ``x`` where ``cap`` is None."""
    return x if cap is None else cap * torch.tanh(x / cap)


def float32_linear(
    x: Float[Tensor, "tokens width"], weight: Float[Tensor, "out width"], bias: Float[Tensor, " out"] | None
) -> Float[Tensor, "tokens out"]:
    """Linear map in at least float32 whatever the dtype around it: gate pre-activations are summed over a sequence."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


class HeadNorm(nn.Module):
    """LayerNorm over each head by itself, with one weight per channel, stored minus ``offset``, and no bias."""

    def __init__(self, heads: int, head_dim: int, eps: float | int, *, offset: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((heads, head_dim), 0.0 if offset else 1.0))
        self.eps, self.offset = eps, offset

    @property
    def scale(self) -> Float[Tensor, "heads head_dim"]:
        """The effective weight."""
        return self.weight + 1 if self.offset else self.weight

    def forward(self, x: Float[Tensor, "tokens heads head_dim"]) -> Float[Tensor, "tokens width"]:
        """Normalise and join the heads."""
        return head_norm(x, self.scale, self.eps)


class BlockLinear(nn.Module):
    """Block-diagonal maps of one input, weight [maps, blocks, out, in]; the channels of a block lie side by side."""

    def __init__(self, maps: int, blocks: int, block: int, *, init_width: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(maps, blocks, block, block))
        self.bias = nn.Parameter(torch.zeros(maps, blocks, block)) if bias else None
        small_init_(self.weight, init_width)

    def forward(self, x: Float[Tensor, "tokens width"]) -> tuple[Float[Tensor, "tokens width"], ...]:
        """Return one output per map."""
        outputs = block_linear(x, self.weight)
        if self.bias is None:
            return outputs
        return tuple(y + bias.flatten().to(y.dtype) for y, bias in zip(outputs, self.bias, strict=True))

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

    def forward(
        self, x: Float[Tensor, "tokens width"], residual: Float[Tensor, "tokens width"] | None = None
    ) -> Float[Tensor, "tokens width"]:
        """Apply to each token, and add ``residual``."""
        if self.activation == "gelu" and type(self.up) is Linear:
            inner = self.up(x, activation="gelu")
        else:
            inner = self.up(x)
            inner = activated(inner, self.activation)
        out: Tensor = self.down(inner) if residual is None else added(self.down, inner, residual)
        return out


class CausalConvolution(nn.Module):
    """Depthwise causal convolution with bias, then SiLU; never reaches over a sequence's edge."""

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
        share: SequenceShare | None = None,
    ) -> tuple[Float[Tensor, "tokens channels"], Float[Tensor, "sequences past channels"] | None]:
        """Return the activated tokens and, when asked, the last ``taps - 1`` inputs of each sequence."""
        weight, bias = self.weight, self.bias
        if share is not None:
            run = partial(causal_conv1d, weight=weight, bias=bias, activation="silu")
            return with_neighbours(share, run, x, reach=weight.shape[1] - 1, reverse=reverse), None
        if return_state:
            return causal_conv1d(
                x,
                weight,
                bias,
                cu_seqlens=cu_seqlens,
                initial_state=state,
                reverse=reverse,
                activation="silu",
                return_state=True,
            )
        y = causal_conv1d(
            x, weight, bias, cu_seqlens=cu_seqlens, initial_state=state, reverse=reverse, activation="silu"
        )
        return y, None
