"""The truth: one float64 loop per kernel. Nobody makes these faster; everything faster is tested against them."""

from .attention import attention
from .convolution import causal_conv1d
from .mlstm import mlstm
from .rotary import rotary
from .slstm import slstm

__all__ = ["attention", "causal_conv1d", "mlstm", "rotary", "slstm"]
