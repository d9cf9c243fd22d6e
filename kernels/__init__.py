"""Pure functions on tensors: mLSTM, sLSTM, attention, causal convolution, rotary positions.

All of them take packed sequences (``cu_seqlens``), never let anything cross a boundary, and have exact gradients.
``kernels.reference`` holds the shortest float64 code for each, against which they are tested.
"""

from .attention import attention
from .backends import available_backends, chosen_backend
from .convolution import causal_conv1d
from .mlstm import MLSTMState, mlstm
from .rotary import rotary
from .rows import linear_rows
from .slstm import SLSTMState, slstm

__all__ = [
    "MLSTMState",
    "SLSTMState",
    "attention",
    "available_backends",
    "causal_conv1d",
    "chosen_backend",
    "linear_rows",
    "mlstm",
    "rotary",
    "slstm",
]
