"""Pure functions on tensors: mLSTM, sLSTM, attention, causal convolution, rotary positions, linear maps.

Those on sequences take packed ones (``cu_seqlens``) and never let anything cross a boundary; all gradients are exact.
``kernels.reference`` holds the shortest float64 code for each, against which they are tested.
"""

from .activation import activation
from .attention import attention
from .backends import available_backends, chosen_backend
from .block_linear import block_linear
from .convolution import causal_conv1d
from .gated_norm import gated_norm, head_norm
from .linear import fused_linear, linear
from .memory import keep_freed_memory
from .mlstm import MLSTMState, mlstm
from .rms_norm import rms_norm
from .rotary import rotary
from .rows import linear_rows
from .slstm import SLSTMState, slstm

__all__ = [
    "MLSTMState",
    "SLSTMState",
    "activation",
    "attention",
    "available_backends",
    "block_linear",
    "causal_conv1d",
    "chosen_backend",
    "fused_linear",
    "gated_norm",
    "head_norm",
    "keep_freed_memory",
    "linear",
    "linear_rows",
    "mlstm",
    "rms_norm",
    "rotary",
    "slstm",
]
