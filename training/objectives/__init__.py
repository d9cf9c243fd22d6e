"""Training objectives: token ids and a vocabulary in, inputs, targets and weights out. One file each."""

from .causal import causal
from .masked import masked
from .objective import Objective

__all__ = ["Objective", "causal", "masked"]
