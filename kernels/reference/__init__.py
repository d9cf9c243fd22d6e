"""The truth: float64 code as it is defined. Nobody makes it faster; everything faster is tested against it."""

from .attention import attention
from .convolution import causal_conv1d
from .linear import activation, block_linear, gated_norm, linear, rms_norm
from .mlstm import mlstm
from .rotary import rotary
from .slstm import slstm

__all__ = [
    "activation",
    "attention",
    "block_linear",
    "causal_conv1d",
    "gated_norm",
    "linear",
    "mlstm",
    "rms_norm",
    "rotary",
    "slstm",
]
