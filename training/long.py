"""Sequences longer than a piece: the loss and its exact gradient, piece by piece.

What a causal backbone has to know of the tokens before a piece is its state, a value with gradients. So a batch that is
too long for the memory of its activations is read once without a graph, keeping the states at the borders of pieces;
then the pieces are read again with one, from the last to the first, and each is taught by its own loss and by the
gradient that the piece behind it has left at its final state:

    d loss / d state_p  =  d (loss_p + <d loss / d state_{p+1}, state_{p+1}>) / d state_p

This is gradient checkpointing (Chen et al. 2016, arXiv:1604.06174) over the tokens in place of the blocks. Its cost is
one more forward pass, its memory the graph of one piece and one state per border.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..backbones import BackboneState
from ..errors import ConfigError
from ..models import LanguageModel, Trainable
from ..sequences import PackedBatch
from .objectives import Objective
from .passes import Passes
from .taught import language_model

Loss = tuple[Float[Tensor, ""], BackboneState | None]  # of a piece, and the state behind it


class Piece(NamedTuple):
    """Consecutive tokens of an objective, which may begin and end within sequences.

    Attributes:
        objective: the tokens as a batch of their own; sequences of which it has no token are not in it.
        continues: its first sequence began in the piece before.
        goes_on: its last sequence goes on in the piece behind.
    """

    objective: Objective
    continues: bool
    goes_on: bool


def pieces_of(objective: Objective, tokens: int) -> list[Piece]:
    """Cut an objective into pieces of ``tokens`` tokens, the last one with what is left."""
    edges = objective.batch.cu_seqlens
    ends = [*range(0, len(objective.batch.tokens), tokens), len(objective.batch.tokens)]
    inside = [not bool((edges == end).any()) for end in ends]
    return [
        Piece(_cut(objective, start, end), inside[i], inside[i + 1]) for i, (start, end) in enumerate(pairwise(ends))
    ]


def _cut(objective: Objective, start: int, end: int) -> Objective:
    batch = objective.batch
    edges = batch.cu_seqlens.clamp(start, end) - start
    kept = edges.diff() > 0
    part = PackedBatch(
        batch.tokens[start:end],
        F.pad(edges.diff()[kept].cumsum(0), (1, 0)),
        batch.positions[start:end],
        {name: value[kept] for name, value in batch.conditions.items()},
    )
    return Objective(part, objective.targets[start:end], objective.weights[start:end])


def piece_loss(
    model: Trainable,
    objective: Objective,
    state: BackboneState | None = None,
    *,
    return_state: bool = False,
) -> tuple[Float[Tensor, ""], BackboneState | None]:
    """Weighted sum of the cross-entropies (nats) of tokens that come after ``state``, and the state after them."""
    model, device = language_model(model), model.device
    batch = objective.batch.to(device)
    hidden, after = model.backbone(batch, state, return_state=return_state)
    counted = objective.weights.nonzero()[:, 0]
    at = counted.to(device) if len(counted) < len(objective.weights) else None
    logits = model.logits(hidden, batch, at)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(logits, objective.targets[counted].to(device), reduction="none")
    return (losses * objective.weights[counted].to(device)).sum(), after


def backward_in_pieces(
    passes: Passes, objective: Objective, *, tokens: int, scale: float = 1.0, last: bool = True
) -> Float[Tensor, ""]:
    """Add the gradient of the loss of a whole batch to that of the parameters, with the graph of one piece at a time.

    It is the exact gradient of ``scale * sum(weights * cross-entropies)``, however long the sequences are and wherever
    they are cut. Dropout draws the same in both passes: each piece has a seed, drawn from torch's generator.

    Args:
        passes: of a model with a causal backbone.
        objective: what it reads and should say.
        tokens: of a piece, the most that are read with a graph.
        scale: what the loss is multiplied by.
        last: whether no other batch follows before the weights change.

    Returns:
        The loss times ``scale``, without a graph.

    Raises:
        ConfigError: the backbone is not causal.
    """
    model = language_model(passes.model)
    check_causal(model)
    pieces = pieces_of(objective, tokens)
    seeds: list[int] = torch.randint(2**62, (len(pieces),)).tolist()
    pieces = _filled_up(pieces, passes.most(len(pieces)), objective)
    seeds += [0] * (len(pieces) - len(seeds))
    states = _read_ahead(passes, pieces, seeds)
    further = any(parameter.requires_grad for parameter in model.backbone.parameters())
    summed: Tensor = torch.zeros((), device=model.device)
    behind: dict[str, Tensor | None] = {}  # gradients at the state after the piece
    for number in reversed(range(len(pieces))):
        seed_draws(seeds[number], model.device)
        state = states[number]
        before = None if state is None else state.map(_leaf if further else torch.Tensor.detach)
        loss, after = passes.forward(_reading(passes, pieces[number], before))
        loss = loss * scale
        taught = loss
        for name, tensor in ({} if after is None else after.tensors()).items():
            gradient = behind.get(name)
            if tensor.requires_grad and (gradient is not None or passes.empty is not None):
                taught = taught + (tensor * (torch.zeros_like(tensor) if gradient is None else gradient)).sum()
        passes.backward(taught, last=last and number == 0)
        behind = {} if before is None else {name: tensor.grad for name, tensor in before.tensors().items()}
        summed = summed + loss.detach()
    return summed


def loss_in_pieces(passes: Passes, objective: Objective, *, tokens: int) -> Float[Tensor, ""]:
    """Weighted sum of the cross-entropies (nats) of a whole batch, read piece by piece, without a gradient.

    Raises:
        ConfigError: the backbone is not causal.
    """
    check_causal(language_model(passes.model))
    total = torch.zeros((), device=passes.model.device)
    state = passes.empty
    pieces = pieces_of(objective, tokens)
    with torch.no_grad():
        for piece in _filled_up(pieces, passes.most(len(pieces)), objective):
            loss, state = passes.forward(_reading(passes, piece, state))
            total = total + loss
    return total


def seed_draws(seed: int, device: torch.device) -> None:
    """Seed what dropout on ``device`` draws from.

    The same draws as of ``torch.manual_seed``, which asks every kind of device that there could be: 0.1 ms.
    """
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


def check_causal(model: LanguageModel) -> None:
    """Raise where a sequence cannot be read piece by piece.

    Raises:
        ConfigError: the backbone is not causal.
    """
    if not model.causal:
        raise ConfigError(
            'A sequence is read in pieces, with long="whole" or "carry", by causal backbones: no other has a state. '
            'With long="cut" each piece is a sequence of its own.'
        )


def _filled_up(pieces: list[Piece], count: int, objective: Objective) -> list[Piece]:
    """So many pieces, the last ones without weight: another process has more of them, and all make as many passes."""
    first = pieces[0].objective if pieces else objective
    silent = Objective(first.batch, first.targets, torch.zeros_like(first.weights))
    return pieces + [Piece(silent, continues=False, goes_on=False)] * (count - len(pieces))


def _read_ahead(passes: Passes, pieces: list[Piece], seeds: list[int]) -> list[BackboneState | None]:
    """The state that each piece goes on from, where one does."""
    states = [passes.empty] if pieces else []
    began = 0  # the first state of the sequence under way
    for piece, seed in zip(pieces[:-1], seeds, strict=False):
        if not piece.goes_on and passes.empty is None:
            states.append(None)
            continue
        seed_draws(seed, passes.model.device)
        with torch.no_grad():
            state = passes.forward(partial(_state_behind, piece=piece, before=states[-1]))
        if not piece.continues or len(piece.objective.batch) > 1:
            began = len(states)
        if state.grows and piece.goes_on:  # the keys of all tokens stand in one memory, not anew for each border
            states[began:] = [None if old is None else old.within(state) for old in states[began:]]
        states.append(state)
    return states


def _reading(passes: Passes, piece: Piece, before: BackboneState | None) -> partial[Loss]:
    """The forward pass of a piece, which gives its loss, and the state behind it if that is asked for."""
    return partial(_piece, piece=piece, before=before, return_state=piece.goes_on or passes.empty is not None)


def _piece(
    model: Trainable, piece: Piece, before: BackboneState | None, *, return_state: bool
) -> tuple[Float[Tensor, ""], BackboneState | None]:
    """The loss of a piece, and the state of the sequence that goes on behind it."""
    batch = piece.objective.batch
    loss, after = piece_loss(model, piece.objective, _before(before, batch), return_state=return_state)
    return loss, None if after is None else _behind(after, piece)


def _state_behind(model: Trainable, piece: Piece, before: BackboneState | None) -> BackboneState:
    """The state of the sequence that goes on behind a piece."""
    batch = piece.objective.batch.to(model.device)
    after = language_model(model).backbone(batch, _before(before, batch), return_state=True)[1]
    assert after is not None
    return _behind(after, piece)


def _before(state: BackboneState | None, batch: PackedBatch) -> BackboneState | None:
    """The state of all sequences of a piece, of which the first goes on from ``state`` if that is of one."""
    return None if state is None else state.spread(torch.arange(len(state)), len(batch))


def _behind(state: BackboneState, piece: Piece) -> BackboneState:
    """Of the sequences of a piece that which goes on."""
    count = len(piece.objective.batch)
    return state.select(torch.arange(count - 1 if piece.goes_on else count, count))


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.is_floating_point())
