"""Kernels in Triton, for GPUs; imported only where that backend is chosen, since Triton may be absent.

Plain masked loads and stores with 64-bit offsets: no block pointers, no autotuning, nothing compiled at import. With
``TRITON_INTERPRET=1`` in the environment before the first import they run on CPU tensors, slowly, for tests.
"""

from .mlstm import mlstm
from .slstm import slstm

__all__ = ["mlstm", "slstm"]
