"""Truncated back-propagation through time: the state that goes from step to step, without its gradient.

Of a sequence longer than a piece every token is read after all that came before it, as it will be when the model is
used, and the gradient goes back to the beginning of the piece (Williams and Peng 1990).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
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
from .long import check_causal, piece_loss
from .objectives import Objective
from .passes import Passes

NAME = "state.safetensors"
BATCHES = "batches"  # of the file: of each row the number of its batch


class Carried:
    """The states of the sequences that the next step goes on with.

    A step takes those of each of its batches and leaves those after its own tokens. A batch has its number from the
    lanes, so that the same process reads them to the end of the epoch.

    Attributes:
        states: by the number of the batch, one row for each sequence that goes on, in the order of the lanes.
    """

    def __init__(self, states: Mapping[int, BackboneState] | None = None) -> None:
        self.states = dict(states or {})
        self._behind: dict[int, BackboneState] = {}

    def take(self, number: int, rows: int) -> BackboneState | None:
        """Return the states of the ``rows`` sequences with which batch ``number`` goes on.

        Raises:
            InputError: there are not so many, so this is not the state of the run.
        """
        if not rows:
            return None
        state = self.states.get(number)
        if state is None or len(state) != rows:
            found = 0 if state is None else len(state)
            raise InputError(
                f"The batch goes on with {rows} sequences, and there is a state of {found}.",
                hint="The checkpoint is not whole; start the run again.",
            )
        return state

    def leave(self, number: int, state: BackboneState) -> None:
        """Keep the states of batch ``number`` for the next step; nothing of the graph is kept."""
        self._behind[number] = state.detach()

    def end_step(self) -> None:
        """Have the states that were left ready to be taken."""
        self.states, self._behind = self._behind, {}

    def share(self, rank: int, world_size: int) -> Carried:
        """Return the states of the batches that process ``rank`` reads, see ``batches.rank_share``."""
        return Carried({number: state for number, state in self.states.items() if number % world_size == rank})

    def write(self, folder: Path) -> None:
        """Write ``state.safetensors``, if there is a state."""
        if self.states:
            numbers = sorted(self.states)
            states = [self.states[number] for number in numbers]
            tensors = BackboneState.concatenate(states).tensors()
            rows = torch.tensor([len(state) for state in states])
            tensors[BATCHES] = torch.tensor(numbers).repeat_interleave(rows)
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / NAME)

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
            state, batches = made.with_tensors(tensors), tensors[BATCHES]
        except (OSError, SafetensorError, KeyError) as error:
            raise InputError(
                f"The checkpoint is damaged ({error}).", path=folder / NAME, hint="Start the run again."
            ) from None
        numbers = sorted(set(batches.tolist()))
        return cls({number: state.select((batches == number).nonzero()[:, 0]) for number in numbers})


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
    passes: Passes,
    objective: Objective,
    carried: Carried,
    *,
    number: int = 0,
    counted: bool = True,
    scale: float = 1.0,
    last: bool = True,
) -> Float[Tensor, ""]:
    """Add the gradient of the loss of one batch of lanes, times ``scale``, to that of the parameters.

    Sequences whose positions begin above 0 go on from what is ``carried``; the states of those with the condition
    ``GOES_ON`` are left there. ``carried.end_step()`` comes behind the last batch of a step.

    Args:
        passes: of a model whose state does not grow.
        objective: what the lanes read.
        carried: the states.
        number: of the batch.
        counted: whether it is this process's own; of another's no state is here, and none is left.
        scale: what the loss is multiplied by, 0 where it is not counted.
        last: whether no other batch follows before the weights change.

    Returns:
        The loss times ``scale``, without a graph.

    Raises:
        InputError: what is carried is not the state of these sequences.
    """
    if not counted:
        objective = _as_begun(objective)
    batch = objective.batch
    continued = batch.positions[batch.cu_seqlens[:-1]].nonzero()[:, 0]
    goes_on = batch.conditions[GOES_ON].nonzero()[:, 0]
    before = carried.take(number, len(continued)) or passes.empty
    state = None if before is None else before.spread(continued, len(batch))
    return_state = len(goes_on) > 0 or passes.empty is not None
    loss, after = passes.forward(partial(piece_loss, objective=objective, state=state, return_state=return_state))
    loss = loss * scale
    passes.backward(loss, last=last)
    if counted and after is not None and len(goes_on):
        carried.leave(number, after.select(goes_on))
    return loss.detach()


def _as_begun(objective: Objective) -> Objective:
    """The same tokens as if each sequence began with them."""
    batch = objective.batch
    begun = PackedBatch.from_lengths(batch.tokens, batch.cu_seqlens.diff())
    begun = PackedBatch(begun.tokens, begun.cu_seqlens, begun.positions, batch.conditions)
    return Objective(begun, objective.targets, objective.weights)
