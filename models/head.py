"""Heads: hidden states to logits over the vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..backbones.layers import apply_linear, linear_in, small_init_, soft_cap
from ..errors import ConfigError

KINDS = ("linear", "esm")
ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu}


@dataclass(frozen=True)
class HeadConfig:
    """A head as plain values.

    Attributes:
        kind: ``"linear"``, or ``"esm"``: dense, GELU, LayerNorm, then the linear decoder (Lin et al. 2023).
        tied: the decoder is the embedding of the backbone; None: as the kind has it (linear no, esm yes).
        bias: the decoder has a bias; None: as the kind has it (linear no, esm yes).
        soft_cap: logits become ``soft_cap * tanh(logits / soft_cap)``.
        norm_eps: of the LayerNorm.
        activation: behind the dense layer, ``"gelu"`` (of erf) or ``"relu"``.
        contacts: the model has a logistic regression from its attention maps to contacts of residues, as ESM-2 has
            (``LanguageModel.contacts``, see ``bio.contacts``).
    """

    kind: str = "linear"
    tied: bool | None = None
    bias: bool | None = None
    soft_cap: float | int | None = None
    norm_eps: float | int = 1e-5
    activation: str = "gelu"
    contacts: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"A head is {' or '.join(KINDS)}, not {self.kind!r}.")
        if self.activation not in ACTIVATIONS:
            raise ConfigError(f"The activation is {self.activation!r}; it can be {', '.join(ACTIVATIONS)}.")
        if self.soft_cap is not None and self.soft_cap <= 0:
            raise ConfigError(f"soft_cap is {self.soft_cap}; it must be positive.")

    @property
    def is_tied(self) -> bool:
        """Whether the decoder is the embedding of the backbone."""
        return self.kind == "esm" if self.tied is None else self.tied

    @property
    def has_bias(self) -> bool:
        """Whether the decoder has a bias."""
        return self.kind == "esm" if self.bias is None else self.bias


class Head(nn.Module):
    """The head of a ``HeadConfig``; a tied one is given the embedding at each call and holds no copy."""

    def __init__(self, config: HeadConfig, *, width: int, vocabulary_size: int) -> None:
        super().__init__()
        self.config = config
        self.dense = linear_in(width, width, bias=True) if config.kind == "esm" else None
        self.norm = nn.LayerNorm(width, config.norm_eps) if config.kind == "esm" else None
        if config.is_tied:
            self.register_parameter("weight", None)
        else:
            self.weight = nn.Parameter(torch.empty(vocabulary_size, width))
            small_init_(self.weight, width)
        self.bias = nn.Parameter(torch.zeros(vocabulary_size)) if config.has_bias else None

    def forward(
        self, hidden: Float[Tensor, "tokens width"], embedding: Float[Tensor, "vocabulary width"]
    ) -> Float[Tensor, "tokens vocabulary"]:
        """Return logits."""
        if self.dense is not None and self.norm is not None:
            hidden = self.norm(ACTIVATIONS[self.config.activation](self.dense(hidden)))
        logits = apply_linear(hidden, embedding if self.weight is None else self.weight, self.bias)
        return soft_cap(logits, self.config.soft_cap)
