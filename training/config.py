"""The settings of a training run."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ConfigError
from .schedule import SCHEDULES

# What each objective needs the backbone to see.
OBJECTIVES = {
    "causal": "causal",
    "answer": "causal",
    "fill-in": "causal",
    "masked": "bidirectional",
    "span-masked": "bidirectional",
    "entity-masked": "bidirectional",
    "swapped": "bidirectional",
    "replaced": "bidirectional",
    "glm": "prefix",
}
WITH_SPANS = ("answer", "entity-masked")  # they need sequences that know their spans
ENTITY_MODES = ("one", "span")
PRECISIONS = ("auto", "fp32", "bf16")
TRAINED = ("all", "head")
LONG = ("cut", "carry", "whole")


@dataclass(frozen=True)
class TrainingConfig:
    """How a model is trained. Exactly one of ``steps``, ``epochs`` and ``minutes`` ends the run.

    With ``steps`` or ``epochs`` the weights are a function of the seed, the data and the settings, bit for bit on one
    CPU. With ``minutes`` the share of the time gone by drives the learning rate, so two runs are not equal.

    Attributes:
        objective: "causal" (next token), "fill-in" (next token, spans moved behind), "masked", "span-masked", "swapped"
            (other tokens in place of masks), "replaced" (which tokens are other ones, see ``add_detector``) or "glm"
            (masked tokens and blanks), see ``training.objectives``. Where the sequences have spans also "answer" (next
            token, of the spans alone) and "entity-masked" (first the spans).
            It is of plain sequences: ``Labelled`` and ``Preferences`` are taught by what they say themselves.
        steps: optimiser steps.
        epochs: passes over the data.
        minutes: wall-clock minutes, validation included.
        batch_tokens: most tokens of one packed batch; a longer sequence gets a batch of its own.
        accumulation: packed batches per optimiser step.
        max_length: longer sequences are read in consecutive pieces of at most so many tokens; None keeps them whole.
        long: how the pieces of one sequence hang together. "cut": not at all, each is a sequence of its own. "carry":
            step after step, the state carried from one to the next, and the gradient no further back than a piece
            (truncated back-propagation); a batch is ``batch_tokens // max_length`` lanes, each of which reads the next
            ``max_length`` tokens of its sequences. "whole": in one step, with the exact gradient, of which one piece
            at a time is in memory (``training/long.py``); batches are as without ``max_length``. Both of these are for
            causal backbones; positions go on, and every next token is asked for, those behind a cut too.
        trained: "all", or "head": the backbone is frozen, the head that the data reaches is not. Whatever is frozen
            already (``models.add_adapter``) stays so.
        learning_rate: highest learning rate of AdamW.
        layer_decay: factor on the learning rate from each block to the one below it: the head and the norm before it
            have the whole one, the last block ``layer_decay`` times as much, the embedding
            ``layer_decay ** (depth + 1)`` times (Howard and Ruder 2018, section 3.2; Clark et al. 2020, appendix B).
        schedule: how the learning rate falls after its warm-up: along a "cosine", or "linear".
        warmup: share of the run over which the learning rate rises from 0.
        floor: the learning rate at the end, as a share of the highest.
        weight_decay: decay of the weight matrices; norms and biases have none.
        decay_embeddings: decay token embeddings too.
        beta1: decay of AdamW's first moment.
        beta2: decay of AdamW's second moment.
        clip: largest gradient norm; 0 does not clip.
        mask_share: share of the tokens that masked training predicts, that "replaced" puts others in the place of, and
            that the short blanks of "glm" hold.
        entity_share: share of these that "entity-masked" takes in spans.
        entity_mode: whether it takes "one" token of a span or the whole "span".
        precision: "fp32", "bf16" (autocast), or "auto": bf16 on a GPU that has it, fp32 elsewhere.
        gradient_checkpointing: recompute activations in the backward pass to save memory.
        seed: of the data order, the masks and the dropout.
        log_every: steps between lines of ``metrics.jsonl``.
        validate_every: steps between validation losses; None: at the end of each epoch and of the run.
        checkpoint_every: steps between checkpoints; None: every five minutes. One is always written at the end.
        snapshot_every: steps between copies of the weights that are kept, for ``average``; None: there are none.
    """

    objective: str = "causal"
    steps: int | None = None
    epochs: int | None = None
    minutes: float | int | None = None
    batch_tokens: int = 8192
    accumulation: int = 1
    max_length: int | None = None
    long: str = "cut"
    trained: str = "all"
    learning_rate: float = 1e-3
    layer_decay: float | int = 1.0
    schedule: str = "cosine"
    warmup: float | int = 0.05
    floor: float | int = 0.1
    weight_decay: float | int = 0.1
    decay_embeddings: bool = False
    beta1: float | int = 0.9
    beta2: float | int = 0.95
    clip: float | int = 1.0
    mask_share: float = 0.15
    entity_share: float | int = 0.5
    entity_mode: str = "one"
    precision: str = "auto"
    gradient_checkpointing: bool = False
    seed: int = 0
    log_every: int = 10
    validate_every: int | None = None
    checkpoint_every: int | None = None
    snapshot_every: int | None = None

    def __post_init__(self) -> None:
        limits = [name for name in ("steps", "epochs", "minutes") if getattr(self, name) is not None]
        if len(limits) != 1:
            raise ConfigError(
                f"Exactly one of steps, epochs and minutes ends a run; given: {', '.join(limits) or 'none'}."
            )
        for name, allowed in (
            *(("objective", OBJECTIVES), ("precision", PRECISIONS), ("trained", TRAINED), ("long", LONG)),
            *(("entity_mode", ENTITY_MODES), ("schedule", SCHEDULES)),
        ):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it can be {', '.join(allowed)}.")
        for name in (
            *("steps", "epochs", "minutes", "batch_tokens", "accumulation", "max_length", "learning_rate"),
            *("log_every", "validate_every", "checkpoint_every", "snapshot_every"),
        ):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name} must be positive, not {value}.")
        if self.max_length is not None and self.max_length < 2:
            raise ConfigError("max_length must be at least 2: a piece of one token teaches nothing.")
        if self.long != "cut":
            self._check_long(self.max_length)
        for name in ("warmup", "floor", "beta1", "beta2", "entity_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is a share between 0 and 1, not {getattr(self, name)}.")
        if not 0 < self.layer_decay <= 1:
            raise ConfigError(f"layer_decay is a factor above 0 and at most 1, not {self.layer_decay}.")
        if not 0 < self.mask_share < 1:
            raise ConfigError(f"mask_share lies between 0 and 1, not {self.mask_share}.")
        if self.weight_decay < 0 or self.clip < 0:
            raise ConfigError("weight_decay and clip cannot be negative.")

    def _check_long(self, tokens: int | None) -> None:
        if tokens is None:
            raise ConfigError(f'long="{self.long}" needs max_length, the tokens of a piece.')
        if OBJECTIVES[self.objective] != "causal":
            raise ConfigError(f'long="{self.long}" is for causal objectives, and the objective is {self.objective!r}.')
        if self.long == "carry" and self.objective != "causal":
            raise ConfigError(
                f'long="carry" reads tokens in their order, and the objective {self.objective!r} moves them. '
                'Use long="whole" or "cut".'
            )
        if self.long == "carry" and self.batch_tokens < tokens:
            raise ConfigError(
                f'long="carry" reads max_length tokens of each lane at a step, and batch_tokens = {self.batch_tokens} '
                f"is less than one lane of {tokens}. Raise batch_tokens or lower max_length."
            )
