"""A language model: tokenizer, backbone and head."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..backbones import AnyConfig, Backbone, BackboneState, TransformerConfig, build, config_to_dict, to_plain
from ..errors import ConfigError
from ..sequences import PackedBatch, Tokenizer, Vocabulary, tokenizer_to_dict
from .card import ModelCard
from .head import Head, HeadConfig
from .task import TaskConfig, TaskHead
from .trainable import Trainable


class LanguageModel(Trainable):
    """Tokens to logits, with everything needed to use the model later.

    Attributes:
        tokenizer: text to token ids and back.
        backbone: token ids to hidden states.
        head: hidden states to logits.
        contacts: attention maps, [blocks x heads], to the log-odds of a contact, where the head configuration says so.
        task: hidden states to what labels say, where the model has learned some (``models.add_task``).
        task_config: what its answers mean.
        name: used for keys such as ``obsm["X_<name>"]`` and as the title of the card.
        card: data, recipe and metrics.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        backbone_config: AnyConfig,
        head_config: HeadConfig | None = None,
        *,
        task_config: TaskConfig | None = None,
        name: str = "model",
        card: ModelCard | None = None,
    ) -> None:
        """Build a freshly initialised model.

        Raises:
            ConfigError: the backbone has fewer embeddings than the tokenizer has tokens, or no attention maps to
                find contacts in.
        """
        super().__init__()
        rows, tokens = backbone_config.vocabulary_size, len(tokenizer.vocabulary)
        if rows < tokens:
            raise ConfigError(f"The backbone's vocabulary_size is {rows}, and the tokenizer has {tokens} tokens.")
        self.tokenizer = tokenizer
        self.backbone: Backbone = build(backbone_config)
        self.head = Head(
            head_config or HeadConfig(),
            width=backbone_config.width,
            vocabulary_size=rows,
            complement=backbone_config.complement,
        )
        self.contacts: nn.Linear | None = None
        if self.head.config.contacts:
            if not isinstance(backbone_config, TransformerConfig):
                raise ConfigError("Contacts are found in the attention maps of a transformer.")
            self.contacts = nn.Linear(backbone_config.depth * backbone_config.heads, 1)
        self.task: TaskHead | None = None
        self.task_config = task_config
        if task_config is not None:
            outputs = len(task_config.names)
            self.task = TaskHead(self.width, outputs, level=task_config.level, dropout=task_config.dropout)
        self.name = name
        self.card = card or ModelCard()

    @property
    def vocabulary(self) -> Vocabulary:
        """The tokenizer's vocabulary."""
        return self.tokenizer.vocabulary

    @property
    def vocabulary_size(self) -> int:
        """Number of the tokenizer's tokens."""
        return len(self.vocabulary)

    @property
    def networks(self) -> tuple[Backbone, ...]:
        """The backbone."""
        return (self.backbone,)

    @property
    def causal(self) -> bool:
        """Whether no token sees a later one, so that the model generates and its state streams."""
        return self.backbone.config.causal

    @property
    def generates(self) -> bool:
        """Whether the model writes sequences: token after token, or into a blank behind a prefix."""
        return self.causal or self.backbone.config.prefixed

    def whole(self, batch: PackedBatch) -> PackedBatch:
        """Return the batch as the model reads whole sequences: where it asks for prefixes, each is its own."""
        if not self.backbone.config.prefixed:
            return batch
        return replace(batch, conditions={**batch.conditions, "prefix": batch.lengths})

    @property
    def width(self) -> int:
        """Channels of the hidden states."""
        return self.backbone.config.hidden_width

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.backbone.embedding.weight.device

    @property
    def parameters_count(self) -> int:
        """Number of parameters."""
        return sum(parameter.numel() for parameter in self.parameters())

    def forward(
        self, batch: PackedBatch, state: BackboneState | None = None, *, return_state: bool = False
    ) -> tuple[Float[Tensor, "tokens vocabulary"], BackboneState | None]:
        """Return the logits of every token and, when asked, the state after the last ones.

        Raises:
            ConfigError, ShapeError: as ``Backbone.forward``.
            InputError: as ``logits``.
        """
        hidden, after = self.backbone(batch, state, return_state=return_state)
        return self.logits(hidden, batch), after

    def logits(
        self,
        hidden: Float[Tensor, "tokens width"],
        batch: PackedBatch | None = None,
        at: Int[Tensor, " chosen"] | None = None,
    ) -> Float[Tensor, "rows vocabulary"]:
        """Return logits over the tokenizer's tokens; rows that only pad the embedding are left out.

        Args:
            hidden: what the backbone made of all tokens of a batch.
            batch: the batch, which a head with conditions asks for those of its sequences; without it there are none.
            at: the tokens whose logits are wanted; None: all.

        Raises:
            InputError: a sequence has a condition's id that there is not.
        """
        conditions = None if batch is None else self.head.condition_ids(batch, at)
        logits: Tensor = self.head(hidden if at is None else hidden[at], self.backbone.embedding.weight, conditions)
        tokens = len(self.vocabulary)
        return logits if logits.shape[1] == tokens else logits[:, :tokens]

    def parts(self) -> dict[str, Any]:
        """Backbone, tokenizer and task, as plain values."""
        parts = {"backbone": config_to_dict(self.backbone.config), "tokenizer": tokenizer_to_dict(self.tokenizer)}
        return parts if self.task_config is None else {**parts, "task": to_plain(self.task_config)}

    def save(self, folder: str | Path, *, format: str | None = None) -> None:
        """Write the model to ``folder``; other files there stay.

        Args:
            folder: made if it is not there.
            format: None for our own, ``config.json``, ``model.safetensors`` and ``README.md``; or the name of another
                package's, which then reads the folder ("hf-esm", ...).

        Raises:
            OutputError: the folder cannot be written, or the disk is full; what stood there before is untouched.
            ConfigError: there is no such format, or it cannot hold this model; or the model has adapters, which
                ``save_adapter`` writes.
        """
        from . import adapters, export, files  # they build language models, so they import this module

        names = adapters.adapter_names(self)
        if names:
            raise ConfigError(
                f"The model has adapters ({', '.join(names)}). save_adapter writes one; merge_adapter and "
                "remove_adapters make the one in use a part of the weights, or use_adapter(model, None) and "
                "remove_adapters leave the base."
            )
        if format is None:
            files.save(self, folder)
        else:
            export.save_as(self, folder, format)


def add_task(model: LanguageModel, config: TaskConfig, *, seed: int = 0) -> None:
    """Give ``model`` a fresh task head, in the place of one that it has; its weights are a function of the seed.

    Runs whose average is to be a model start from one head: give each the same seed, or save the model once with it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = TaskHead(model.width, len(config.names), level=config.level, dropout=config.dropout)
    model.task, model.task_config = head.to(model.device).train(model.training), config
