"""Low-rank adapters of linear maps (LoRA, Hu et al. 2021, arXiv:2106.09685, equation 3).

    y = W x + (alpha / rank) up(down(dropout(x))),      W fixed, down drawn at random, up 0 at the start

A module that carries adapters keeps its parameters and their names. While one of them is chosen it has a class of its
own here, so that whoever asks for a plain linear map (``type(layer) is Linear``) sees that it is none.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..backbones.layers import BlockLinear, Linear, apply_linear
from ..kernels import activation as apply_activation
from .head import Head


class LowRank(nn.Module):
    """An addition of low rank to one map, or to each of several: ``scale * up @ down``.

    Attributes:
        down: [*maps, rank, inputs], N(0, 1 / inputs) at the start.
        up: [*maps, outputs, rank], 0 at the start, so that a new adapter changes nothing.
        scale: alpha / rank.
        dropout: share of the inputs that is dropped in training, where the map reads inputs; see ``WITH_INPUTS``.
    """

    def __init__(self, down: Tensor, up: Tensor, *, scale: float | int, dropout: float | int = 0.0) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)
        self.scale, self.dropout = float(scale), float(dropout)

    @classmethod
    def draw(
        cls, weight: Tensor, rank: int, *, scale: float | int, dropout: float | int, generator: torch.Generator
    ) -> LowRank:
        """Return a fresh one for a weight [*maps, outputs, inputs]; more rank than the weight can have is not made."""
        *maps, outputs, inputs = weight.shape
        rank = min(rank, outputs, inputs)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        down = torch.randn(*maps, rank, inputs, generator=generator, dtype=dtype) / math.sqrt(inputs)
        up = torch.zeros(*maps, outputs, rank, dtype=dtype)
        return cls(down.to(weight.device), up.to(weight.device), scale=scale, dropout=dropout)

    def delta(self) -> Float[Tensor, "*maps outputs inputs"]:
        """Return what is added to the weight."""
        with torch.autocast(self.up.device.type, enabled=False):
            return self.scale * (self.up @ self.down)

    def forward(
        self, x: Float[Tensor, "tokens inputs"], y: Float[Tensor, "tokens outputs"]
    ) -> Float[Tensor, "tokens outputs"]:
        """Return ``y`` and what the adapter makes of ``x``."""
        low = apply_linear(F.dropout(x, self.dropout, self.training), self.down, None)
        return apply_linear(low * self.scale, self.up, None, residual=y)


class AdaptedLinear(Linear):
    """A ``Linear`` that adds what its chosen adapter makes of the same input."""

    def forward(
        self,
        input: Float[Tensor, "tokens inputs"],
        *,
        activation: str | None = None,
        residual: Float[Tensor, "tokens outputs"] | None = None,
    ) -> Float[Tensor, "tokens outputs"]:
        """Map each token."""
        if activation is not None:
            y = apply_activation(self(input), activation)
            return y if residual is None else residual + y
        y = apply_linear(input, self.weight, self.bias, residual=residual)
        out: Tensor = chosen_adapter(self)(input, y)
        return out


class _ReadWeight:
    """A module whose weight is read by others too, so that the adapter is added to what they read."""

    @property
    def weight(self) -> Tensor:
        """The weight with the chosen adapter's addition."""
        assert isinstance(self, nn.Module)
        weight, delta = self._parameters["weight"], chosen_adapter(self).delta()
        assert weight is not None
        return weight + delta.to(weight.dtype)


class AdaptedReadLinear(_ReadWeight, nn.Linear):  # type: ignore[override]
    """A plain ``nn.Linear``: the gates of an mLSTM."""


class AdaptedBlockLinear(_ReadWeight, BlockLinear):  # type: ignore[misc]
    """Block-diagonal maps, each block with an adapter of its own."""


class AdaptedHead(_ReadWeight, Head):  # type: ignore[misc]
    """The output matrix of a language-model head that is not tied to the embedding."""


ADAPTED: dict[type[nn.Module], type[nn.Module]] = {
    Linear: AdaptedLinear,
    nn.Linear: AdaptedReadLinear,
    BlockLinear: AdaptedBlockLinear,
    Head: AdaptedHead,
}
PLAIN = {adapted: plain for plain, adapted in ADAPTED.items()}


def chosen_adapter(module: nn.Module) -> LowRank:
    """Return the chosen adapter of a module that has one."""
    adapter = module.adapters[module.adapter]  # type: ignore[index]
    assert isinstance(adapter, LowRank)
    return adapter


def base_weight(module: nn.Module) -> Tensor:
    """Return the weight of a linear map as it is, or was before an adapter was merged into it."""
    kept: Tensor | None = getattr(module, "unmerged", None)
    weight = module._parameters["weight"] if kept is None else kept
    assert weight is not None
    return weight.detach()


def adapters_of(module: nn.Module) -> nn.ModuleDict:
    """Return the adapters that a module carries, perhaps none."""
    carried = module._modules.get("adapters")
    return carried if isinstance(carried, nn.ModuleDict) else nn.ModuleDict()


def attach(module: nn.Module, name: str, adapter: LowRank) -> None:
    """Let a module carry one more adapter."""
    if "adapters" not in module._modules:
        module.adapters = nn.ModuleDict()
    adapters_of(module)[name] = adapter
    adapter.train(module.training)


def choose(module: nn.Module, name: str | None) -> None:
    """Use the adapter ``name`` of a module that carries it, else none; a merged one is taken out of the weight."""
    weight, kept = module._parameters["weight"], getattr(module, "unmerged", None)
    if kept is not None and weight is not None:
        weight.data = kept.to(weight.device)
        del module.unmerged
    carried = name is not None and name in adapters_of(module)
    module.__dict__["adapter"] = name if carried else None
    plain = PLAIN.get(type(module), type(module))
    module.__class__ = ADAPTED[plain] if carried else plain


@torch.no_grad()
def merge(module: nn.Module) -> None:
    """Put the chosen adapter into the weight of its module, which is then a plain map; the old weight is kept."""
    if type(module) not in PLAIN:
        return
    weight, adapter = module._parameters["weight"], chosen_adapter(module)
    assert weight is not None
    module.unmerged = weight.data
    weight.data = (weight.data.to(adapter.up.dtype) + adapter.delta()).to(weight.dtype)
    module.__class__ = PLAIN[type(module)]
