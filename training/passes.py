"""A model's forward and backward passes, as a loss makes them whatever engine a run has."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from ..backbones import BackboneState
from ..errors import ConfigError
from ..models import Trainable

T = TypeVar("T")


@runtime_checkable
class Passes(Protocol):
    """What a loss asks of an engine. All processes of a run make the same passes, since they meet in each of them.

    Attributes:
        model: the model; its weights are whole within ``forward`` alone.
        empty: a state of no sequence, from which every piece goes on that begins with its sequence, where the passes of
            all processes must be alike to the last gradient; None: such a piece has no state.
    """

    model: Trainable
    empty: BackboneState | None

    def forward(self, read: Callable[[Trainable], T]) -> T:
        """What ``read`` returns of the model, in the precision of the run."""

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Add the gradient of ``loss`` to that of the parameters; it is the ``last`` one before they change."""

    def most(self, passes: int) -> int:
        """How many passes the process makes that has most to make."""


class Direct:
    """The passes of a model in this process alone."""

    empty: BackboneState | None = None

    def __init__(self, model: Trainable, precision: str = "fp32") -> None:
        self.model, self.precision = model, precision

    def forward(self, read: Callable[[Trainable], T]) -> T:
        """As ``Passes.forward``."""
        with autocast(self.precision, self.model.device):
            return read(self.model)

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """As ``Passes.backward``."""
        loss.backward()  # type: ignore[no-untyped-call]

    def most(self, passes: int) -> int:
        """The number itself."""
        return passes


def chosen_precision(precision: str, device: torch.device) -> str:
    """Tell what ``precision`` comes to on ``device``.

    Raises:
        ConfigError: bf16 is asked for on a GPU that does not have it.
    """
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "auto":
        return "bf16" if has_bf16 else "fp32"
    if precision == "bf16" and device.type == "cuda" and not has_bf16:
        raise ConfigError("This GPU has no bfloat16; use precision fp32 or auto.")
    return precision


def autocast(precision: str, device: torch.device) -> AbstractContextManager[None]:
    """Context in which matrix products run in ``precision``; weights and states stay float32."""
    if precision == "fp32":
        return nullcontext()
    cast: AbstractContextManager[None] = torch.autocast(device.type, torch.bfloat16)
    return cast
