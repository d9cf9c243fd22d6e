"""What every backbone is: an embedding, blocks on packed tokens, a final norm, and a state that is a value."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import ConfigError, ShapeError
from ..sequences import PackedBatch
from .decoding import decode, decodes
from .layers import small_init_
from .state import BackboneState
from .strands import both_strands, joined_strands, twice


@dataclass(frozen=True)
class BackboneConfig(ABC):
    """What every configuration tells.

    Attributes:
        family: the name under which it stands in JSON.
        vocabulary_size: rows of the embedding; may be padded beyond the tokens there are.
        width: channels of the residual stream.
        depth: number of blocks.
        complement: id of the complement of each token id, its own where it has none, for reverse-complement parameter
            sharing: the network reads each sequence and its reverse complement, and hidden states have twice the width,
            ``[h(x); h(rc x), tokens and channels in reverse order]``. Such a network is not causal.
    """

    family: ClassVar[str]

    vocabulary_size: int
    width: int
    depth: int
    complement: tuple[int, ...] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        ids = self.complement
        if ids is None:
            return
        if len(ids) != self.vocabulary_size:
            raise ConfigError(f"complement has {len(ids)} ids; the vocabulary_size is {self.vocabulary_size}.")
        wrong = [i for i, other in enumerate(ids) if not 0 <= other < len(ids) or ids[other] != i]
        if wrong:
            raise ConfigError(f"The complement of the complement of token {wrong[0]} is not the token.")

    @property
    @abstractmethod
    def causal(self) -> bool:
        """Whether no token sees a later one."""

    @property
    @abstractmethod
    def positional(self) -> bool:
        """Whether the positions of a batch change what the network gives; else it knows the order of tokens alone."""

    @property
    def hidden_width(self) -> int:
        """Channels of the hidden states."""
        return self.width if self.complement is None else 2 * self.width

    @property
    def streams(self) -> bool:
        """Whether a sequence can be read piece by piece."""
        return self.causal

    @property
    def prefixed(self) -> bool:
        """Whether a batch must say how many tokens of each sequence see each other both ways."""
        return False


class Memory(NamedTuple):
    """Hidden states of another network that cross-attention looks at, one sequence of them for each of the batch.

    Attributes:
        hidden: packed as the tokens of a batch, each sequence at least one [memory_tokens, cross_width].
        cu_seqlens: cumulative lengths from 0, int64 [sequences + 1].
    """

    hidden: Float[Tensor, "memory_tokens cross_width"]
    cu_seqlens: Int[Tensor, " boundaries"]


class Backbone(nn.Module, ABC):
    """Tokens to hidden states.

    A subclass sets ``blocks`` and ``norm`` and says what its blocks need to know of a batch. A block is called as
    ``block(x, context, state, return_state)`` and returns ``(x, state or None)``.

    Attributes:
        config: the configuration it was built from.
        gradient_checkpointing: recompute each block in the backward pass instead of keeping its activations.
    """

    blocks: nn.ModuleList
    norm: nn.Module

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.embedding = nn.Embedding(config.vocabulary_size, config.width)
        small_init_(self.embedding.weight, config.width)

    @abstractmethod
    def context(self, batch: PackedBatch, state: BackboneState | None, *, reuse_state: bool = False) -> Any:
        """Return what every block needs to know of the batch."""

    def with_memory(self, context: Any, memory: Memory) -> Any:
        """Return the context with what cross-attention looks at.

        Raises:
            ConfigError: there is no cross-attention.
        """
        raise ConfigError(f"A backbone of the family {self.config.family!r} has no cross-attention to a memory.")

    def embed(self, batch: PackedBatch) -> Float[Tensor, "tokens width"]:
        """Return the embedding of each token, before the first block."""
        x: Tensor = self.embedding(batch.tokens)
        return x

    def forward(
        self,
        batch: PackedBatch,
        state: BackboneState | None = None,
        *,
        memory: Memory | None = None,
        return_state: bool = False,
        reuse_state: bool = False,
    ) -> tuple[Float[Tensor, "tokens width"], BackboneState | None]:
        """Return hidden states after the final norm and, when asked, the state after the last tokens.

        ``state`` is what an earlier call returned for the same sequences; the batch then holds their next tokens, with
        ``positions`` from ``state.lengths`` on (``PackedBatch.from_lengths(..., offsets=state.lengths)``). It is not
        changed, unless ``reuse_state`` gives it away: then the new state may stand in its memory, which is quicker.
        ``memory`` is what cross-attention looks at, with every piece; without it the backbone is as if it had none.
        Of a batch that processes share (``sequences.share_batch``) the hidden states are those of this process's
        tokens; each has the whole memory, and there is no state.

        Raises:
            ConfigError: a state is given to, or asked of, a backbone that is bidirectional or one that reads a share,
                one is given away where gradients are recorded, a memory is given to a backbone without cross-attention,
                or the heads are not divisible by the processes that share the batch.
            ShapeError: the state belongs to another number of sequences.
        """
        self._check_state(batch, state, return_state, reuse_state)
        batch, context = self._prepared(batch, state, memory, reuse_state=reuse_state)
        x = self.embed(batch)
        after = []
        one_each = state is not None and return_state and decodes(x, batch)
        for i, block in enumerate(self.blocks):
            old = None if state is None else state.blocks[i]
            found = decode(block, x, context, old, reuse_state=reuse_state) if one_each else None
            x, new = found or self._run(block, x, context, old, return_state)
            after.append(new)
        hidden = self._joined(self.norm(x), batch)
        return hidden, _state_after(batch, state, after) if return_state else None

    def hidden_layers(self, batch: PackedBatch, *, memory: Memory | None = None) -> list[Float[Tensor, "tokens width"]]:
        """Return depth + 1 tensors: embeddings, then the output of each block, the last one after the final norm."""
        batch, context = self._prepared(batch, None, memory)
        layers = [self.embed(batch)]
        for block in self.blocks:
            layers.append(self._run(block, layers[-1], context, None, False)[0])
        layers[-1] = self.norm(layers[-1])
        return [self._joined(layer, batch) for layer in layers]

    def _prepared(
        self, batch: PackedBatch, state: BackboneState | None, memory: Memory | None, *, reuse_state: bool = False
    ) -> tuple[PackedBatch, Any]:
        """What the blocks read, the other strands too where the configuration has complements, and its context."""
        if self.config.complement is not None:
            batch = both_strands(batch, self.config.complement)
            if memory is not None:
                memory = Memory(torch.cat((memory.hidden, memory.hidden)), twice(memory.cu_seqlens))
        context = self.context(batch, state, reuse_state=reuse_state)
        return batch, context if memory is None else self.with_memory(context, memory)

    def _joined(self, hidden: Tensor, read: PackedBatch) -> Float[Tensor, "tokens width"]:
        """Hidden states of the batch that was given, from those of the batch that was read."""
        return hidden if self.config.complement is None else joined_strands(hidden, read)

    def selected_layers(
        self,
        batch: PackedBatch,
        numbers: Sequence[int],
        state: BackboneState | None = None,
        *,
        return_state: bool = False,
        reuse_state: bool = False,
    ) -> tuple[list[Float[Tensor, "tokens width"]], BackboneState | None]:
        """Return some of ``hidden_layers``, from 0, and when asked the state, as ``forward`` does.

        No other layer is kept, and without a state no block behind the last of them is run.

        Raises:
            ConfigError, ShapeError: as ``forward``.
        """
        self._check_state(batch, state, return_state, reuse_state)
        depth = len(self.blocks)
        batch, context = self._prepared(batch, state, None, reuse_state=reuse_state)
        x = self.embed(batch)
        found, after = {0: x}, []
        for i, block in enumerate(self.blocks if return_state else self.blocks[: max(numbers, default=0)]):
            x, new = self._run(block, x, context, None if state is None else state.blocks[i], return_state)
            after.append(new)
            if i + 1 in numbers:
                found[i + 1] = self.norm(x) if i + 1 == depth else x
        hidden = [self._joined(found[number], batch) for number in numbers]
        return hidden, _state_after(batch, state, after) if return_state else None

    def _check_state(
        self, batch: PackedBatch, state: BackboneState | None, return_state: bool, reuse_state: bool
    ) -> None:
        if (state is not None or return_state) and batch.share is not None:
            raise ConfigError(
                "A batch that processes share is read whole, without a state: a state is all heads' and all tokens', "
                "and no process has both. Give each process whole batches to read sequences in pieces."
            )
        if (state is not None or return_state) and not self.config.streams:
            raise ConfigError("A bidirectional backbone needs the whole sequence at once: it has no state.")
        if state is not None and len(state) != len(batch):
            raise ShapeError("state", f"of {len(state)} sequences", f"one of {len(batch)}")
        if reuse_state and torch.is_grad_enabled():
            raise ConfigError(
                "A state is given away (reuse_state) only where no gradient is recorded: torch.no_grad()."
            )

    def _run(
        self, block: nn.Module, x: Tensor, context: Any, state: Any, return_state: bool
    ) -> tuple[Float[Tensor, "tokens width"], Any]:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            result: tuple[Tensor, Any] = checkpoint(block, x, context, state, return_state, use_reentrant=False)
            return result
        output: tuple[Tensor, Any] = block(x, context, state, return_state)
        return output


def _state_after(batch: PackedBatch, state: BackboneState | None, blocks: list[Any]) -> BackboneState:
    seen = batch.lengths if state is None else state.lengths + batch.lengths
    return BackboneState(seen, tuple(blocks))
