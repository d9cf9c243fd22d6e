"""Truncated back-propagation through time: the state that goes from step to step, without its gradient.

Of a sequence longer than a piece every token is read after all that came before it, as it will be when the model is
used, and the gradient goes back to the beginning of the piece (Williams and Peng 1990).
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..backbones import BackboneState, TransformerConfig
from ..errors import ConfigError, InputError
from ..models import LanguageModel, Trainable
from ..sequences import PackedBatch
from .lanes import GOES_ON
from .long import Cast, check_causal, piece_loss
from .objectives import Objective

NAME = "state.safetensors"


class Carried:
    """The states of the sequences that the next step goes on with, in the order of their lanes.

    A step takes them, batch by batch, and leaves those after its own tokens.

    Attributes:
        state: one row for each sequence; None: there is none.
    """

    def __init__(self, state: BackboneState | None = None) -> None:
        self.state = state
        self._behind: list[BackboneState] = []
        self._taken = 0

    def take(self, rows: int) -> BackboneState | None:
        """Return the states of the next ``rows`` sequences.

        Raises:
            InputError: there are not so many, so this is not the state of the run.
        """
        if not rows:
            return None
        if self.state is None or self._taken + rows > len(self.state):
            raise InputError(
                f"The batch goes on with {self._taken + rows} sequences, and there is a state of "
                f"{0 if self.state is None else len(self.state)}.",
                hint="The checkpoint is not whole; start the run again.",
            )
        self._taken += rows
        return self.state.select(torch.arange(self._taken - rows, self._taken))

    def leave(self, state: BackboneState) -> None:
        """Keep states for the next step; nothing of the graph is kept."""
        self._behind.append(state.detach())

    def end_step(self) -> None:
        """Have the states that were left ready to be taken."""
        self.state = BackboneState.concatenate(self._behind) if self._behind else None
        self._behind, self._taken = [], 0

    def write(self, folder: Path) -> None:
        """Write ``state.safetensors``, if there is a state."""
        if self.state is not None:
            save_file({name: tensor.contiguous() for name, tensor in self.state.tensors().items()}, folder / NAME)

    @classmethod
    def read(cls, folder: Path | None, model: Trainable) -> Carried:
        """Read what ``write`` wrote; without a file, or without a folder, nothing is carried.

        Raises:
            InputError: the file is damaged, or of another model.
        """
        if folder is None or not (folder / NAME).is_file():
            return cls()
        one = PackedBatch.from_lengths(torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.int64))
        with torch.no_grad():
            made = model.networks[0](one.to(model.device), return_state=True)[1]
        assert made is not None
        try:
            tensors = load_file(folder / NAME, device=str(model.device))
            return cls(made.with_tensors(tensors))
        except (OSError, SafetensorError, KeyError) as error:
            raise InputError(
                f"The checkpoint is damaged ({error}).", path=folder / NAME, hint="Start the run again."
            ) from None


def check_carried(model: LanguageModel) -> None:
    """Raise where a state cannot go from step to step.

    Raises:
        ConfigError: the backbone has none, or one that grows with every token.
    """
    check_causal(model)
    config = model.backbone.config
    if isinstance(config, TransformerConfig) and config.window is None:
        raise ConfigError(
            'long="carry" needs a state that does not grow: that of an xLSTM, or of a transformer with a window. '
            'For this backbone use long="whole" (exact, the keys and values of a sequence in memory) or "cut".'
        )


def backward_carried(
    model: LanguageModel, objective: Objective, carried: Carried, *, total: float = 1.0, cast: Cast = nullcontext
) -> Float[Tensor, ""]:
    """Add the gradient of the loss of one batch of lanes, divided by ``total``, to that of the parameters.

    Sequences whose positions begin above 0 go on from what is ``carried``; the states of those with the condition
    ``GOES_ON`` are left there. ``carried.end_step()`` comes behind the last batch of a step.

    Returns:
        The loss divided by ``total``, without a graph.

    Raises:
        InputError: what is carried is not the state of these sequences.
    """
    batch = objective.batch
    continued = batch.positions[batch.cu_seqlens[:-1]].nonzero()[:, 0]
    goes_on = batch.conditions[GOES_ON].nonzero()[:, 0]
    before = carried.take(len(continued))
    state = None if before is None else before.spread(continued, len(batch))
    with cast():
        loss, after = piece_loss(model, objective, state, return_state=len(goes_on) > 0)
        loss = loss / total
    torch.autograd.backward(loss)
    if after is not None:
        carried.leave(after.select(goes_on))
    return loss.detach()
