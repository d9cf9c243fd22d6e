"""The settings of a training run."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ConfigError

# What each objective needs the backbone to see.
OBJECTIVES = {
    "causal": "causal",
    "fill-in": "causal",
    "masked": "bidirectional",
    "span-masked": "bidirectional",
    "swapped": "bidirectional",
    "glm": "prefix",
}
PRECISIONS = ("auto", "fp32", "bf16")
TRAINED = ("all", "head")


@dataclass(frozen=True)
class TrainingConfig:
    """How a model is trained. Exactly one of ``steps``, ``epochs`` and ``minutes`` ends the run.

    With ``steps`` or ``epochs`` the weights are a function of the seed, the data and the settings, bit for bit on one
    CPU. With ``minutes`` the share of the time gone by drives the learning rate, so two runs are not equal.

    Attributes:
        objective: "causal" (next token), "fill-in" (next token, spans moved behind), "masked", "span-masked", "swapped"
            (other tokens in place of masks) or "glm" (masked tokens and blanks), see ``training.objectives``. It is of
            plain sequences: ``Labelled`` and ``Preferences`` are taught by what they say themselves.
        steps: optimiser steps.
        epochs: passes over the data.
        minutes: wall-clock minutes, validation included.
        batch_tokens: most tokens of one packed batch; a longer sequence gets a batch of its own.
        accumulation: packed batches per optimiser step.
        max_length: longer sequences are cut into consecutive pieces of at most so many tokens, each a sequence of its
            own; None keeps them whole.
        trained: "all", or "head": the backbone is frozen, the head that the data reaches is not. Whatever is frozen
            already (``models.add_adapter``) stays so.
        learning_rate: highest learning rate of AdamW.
        layer_decay: factor on the learning rate from each block to the one below it: the head and the norm before it
            have the whole one, the last block ``layer_decay`` times as much, the embedding
            ``layer_decay ** (depth + 1)`` times (Howard and Ruder 2018, section 3.2; Clark et al. 2020, appendix B).
        warmup: share of the run over which the learning rate rises from 0.
        floor: the learning rate at the end, as a share of the highest.
        weight_decay: decay of the weight matrices; norms and biases have none.
        decay_embeddings: decay token embeddings too.
        beta1: decay of AdamW's first moment.
        beta2: decay of AdamW's second moment.
        clip: largest gradient norm; 0 does not clip.
        mask_share: share of the tokens that masked training predicts, and that the short blanks of "glm" hold.
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
    trained: str = "all"
    learning_rate: float = 1e-3
    layer_decay: float | int = 1.0
    warmup: float | int = 0.05
    floor: float | int = 0.1
    weight_decay: float | int = 0.1
    decay_embeddings: bool = False
    beta1: float | int = 0.9
    beta2: float | int = 0.95
    clip: float | int = 1.0
    mask_share: float = 0.15
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
        for name, allowed in (("objective", OBJECTIVES), ("precision", PRECISIONS), ("trained", TRAINED)):
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
        for name in ("warmup", "floor", "beta1", "beta2"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is a share between 0 and 1, not {getattr(self, name)}.")
        if not 0 < self.layer_decay <= 1:
            raise ConfigError(f"layer_decay is a factor above 0 and at most 1, not {self.layer_decay}.")
        if not 0 < self.mask_share < 1:
            raise ConfigError(f"mask_share lies between 0 and 1, not {self.mask_share}.")
        if self.weight_decay < 0 or self.clip < 0:
            raise ConfigError("weight_decay and clip cannot be negative.")
