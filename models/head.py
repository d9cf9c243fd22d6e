"""Heads: hidden states to logits over the vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..backbones.layers import activated, apply_linear, linear_in, small_init_, soft_cap
from ..errors import ConfigError, InputError
from ..sequences import PackedBatch

KINDS = ("linear", "esm")
DENSE_ACTIVATIONS = ("gelu", "relu")


@dataclass(frozen=True)
class HeadConfig:
    """A head as plain values.

    Attributes:
        kind: ``"linear"``, or ``"esm"``: dense, activation, LayerNorm, then the linear decoder (Lin et al. 2023).
        tied: the decoder is the embedding of the backbone; None: as the kind has it (linear no, esm yes).
        bias: the decoder has a bias; None: as the kind has it (linear no, esm yes).
        soft_cap: logits become ``soft_cap * tanh(logits / soft_cap)``.
        norm_eps: of the LayerNorm.
        activation: behind the dense map, ``"gelu"`` or ``"relu"``.
        conditions: pairs of a name and a number of ids, in JSON and TOML a mapping such as ``{"species": 12}``. A
            sequence whose ``PackedBatch.conditions["species"]`` is 1 to 12 has an embedding added to its hidden states
            before the head (LangSAMP, Liu et al. 2024); with 0, or without such a condition, it has none.
        contacts: the model has a logistic regression from its attention maps to contacts of residues, as ESM-2 has
            (``LanguageModel.contacts``, see ``bio.contacts``).
    """

    kind: str = "linear"
    tied: bool | None = None
    bias: bool | None = None
    soft_cap: float | int | None = None
    norm_eps: float | int = 1e-5
    activation: str = "gelu"
    conditions: tuple[tuple[str, int], ...] = ()
    contacts: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"A head is {' or '.join(KINDS)}, not {self.kind!r}.")
        if self.activation not in DENSE_ACTIVATIONS:
            raise ConfigError(f"The activation of a head is {' or '.join(DENSE_ACTIVATIONS)}, not {self.activation!r}.")
        if self.soft_cap is not None and self.soft_cap <= 0:
            raise ConfigError(f"soft_cap is {self.soft_cap}; it must be positive.")
        for name, count in self.conditions:
            if not name.isidentifier() or count < 1:
                raise ConfigError(f"A condition has a name in one word and at least 1 id, not {name!r} with {count}.")
        if len(dict(self.conditions)) < len(self.conditions):
            raise ConfigError("Two conditions of a head have the same name.")

    @property
    def is_tied(self) -> bool:
        """Whether the decoder is the embedding of the backbone."""
        return self.kind == "esm" if self.tied is None else self.tied

    @property
    def has_bias(self) -> bool:
        """Whether the decoder has a bias."""
        return self.kind == "esm" if self.bias is None else self.bias


class ConditionTable(nn.Module):
    """Embeddings of the ids 1 to ``count`` of a condition; they start at zero, as id 0 stays."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(count, width))

    def forward(self, ids: Int[Tensor, " rows"]) -> Float[Tensor, "rows width"]:
        """Return the embedding of each id."""
        rows = self.weight[(ids - 1).clamp(min=0)]
        return torch.where((ids > 0)[:, None], rows, torch.zeros_like(rows))


class Head(nn.Module):
    """The head of a ``HeadConfig``; a tied one is given the embedding at each call and holds no copy.

    Over a backbone with a ``complement`` (see ``BackboneConfig``) it reads the state of either strand by itself and
    gives a token the sum of its logit and of its complement's on the other strand. So the logits of the reverse
    complement are those of the complements, in reverse order.
    """

    def __init__(
        self, config: HeadConfig, *, width: int, vocabulary_size: int, complement: tuple[int, ...] | None = None
    ) -> None:
        """Build a fresh one; ``width`` is that of one strand."""
        super().__init__()
        self.config, self.complement = config, complement
        self.dense = linear_in(width, width, bias=True) if config.kind == "esm" else None
        self.norm = nn.LayerNorm(width, config.norm_eps) if config.kind == "esm" else None
        if config.is_tied:
            self.register_parameter("weight", None)
        else:
            self.weight = nn.Parameter(torch.empty(vocabulary_size, width))
            small_init_(self.weight, width)
        self.bias = nn.Parameter(torch.zeros(vocabulary_size)) if config.has_bias else None
        self.conditions = nn.ModuleDict({name: ConditionTable(count, width) for name, count in config.conditions})

    def forward(
        self,
        hidden: Float[Tensor, "rows hidden_width"],
        embedding: Float[Tensor, "vocabulary width"],
        conditions: Mapping[str, Int[Tensor, " rows"]] | None = None,
    ) -> Float[Tensor, "rows vocabulary"]:
        """Return logits; ``conditions`` are the ids of each row, see ``condition_ids``."""
        if self.complement is not None:
            own, other = hidden.chunk(2, dim=-1)
            hidden = torch.cat((own, other.flip(-1)))
        for name, ids in (conditions or {}).items():
            hidden = hidden + self.conditions[name](ids).repeat(len(hidden) // max(len(ids), 1), 1)
        if self.dense is not None and self.norm is not None:
            hidden = self.norm(activated(self.dense(hidden), self.config.activation))
        own_weight = self.weight
        logits = apply_linear(hidden, embedding if own_weight is None else own_weight, self.bias)
        if self.complement is not None:
            own, other = logits.chunk(2)
            logits = own + other[:, torch.tensor(self.complement, device=other.device)]
        return soft_cap(logits, self.config.soft_cap)

    def condition_ids(self, batch: PackedBatch, at: Int[Tensor, " rows"] | None = None) -> dict[str, Tensor]:
        """Return for each condition that the batch has the id of every token, or of the tokens ``at``.

        Raises:
            InputError: there is no such id.
        """
        found = {}
        for name, count in self.config.conditions:
            ids = batch.conditions.get(name)
            if ids is None:
                continue
            if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) <= count:
                raise InputError(
                    f"The ids of {name} are 0 (none) to {count}, not {int(ids.min())} to {int(ids.max())}."
                )
            owner = batch.sequence_ids
            found[name] = ids[owner if at is None else owner[at]]
        return found
