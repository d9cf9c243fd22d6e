"""Compile every Triton kernel for an NVIDIA GPU that need not be there, without TRITON_INTERPRET.

    python tests/kernels/compile_triton.py 90 float32 130 2 state

takes the compute capability, the dtype of the mLSTM, the head_dim of the sLSTM, the number of heads, and whether there
is a state. Launches are caught on their way and compiled for the types of their arguments; printed is the shared memory
of each, which must be there on such a GPU.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
import triton
from processive.kernels import triton as ours
from processive.kernels.triton import mlstm_kernels, slstm_kernels
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SHARED = {90: 227 * 1024}  # bytes a program may have
SHARED_ELSEWHERE = 99 * 1024  # the least among 8.x and 12.x; 8.0 has 163
TYPES = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
}
OPTIONS = "num_warps", "num_stages"


def kind(x: Any) -> str:
    """Return Triton's name for the type of an argument; None and 1 are constants to it."""
    if isinstance(x, torch.Tensor):
        return TYPES[x.dtype]
    return "constexpr" if x is None or x == 1 else {int: "i32", float: "fp32"}[type(x)]


class Compiler:
    """Stands in for a kernel: a launch compiles it."""

    def __init__(self, kernel: Any, capability: int) -> None:
        self.kernel, self.capability = kernel, capability

    def __getitem__(self, grid: Any) -> Any:
        return self.launch

    def launch(self, *arguments: Any, **constants: Any) -> None:
        options = {name: constants.pop(name) for name in OPTIONS if name in constants}
        names = self.kernel.arg_names
        given = dict(zip(names, arguments, strict=False))
        signature = {name: kind(x) for name, x in given.items()}
        constants |= {name: x for name, x in given.items() if signature[name] == "constexpr"}
        aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if signature[name][0] == "*"}
        signature |= dict.fromkeys(constants, "constexpr")
        source = ASTSource(
            fn=self.kernel,
            signature={name: signature[name] for name in names},
            constexprs={(names.index(name),): value for name, value in constants.items()},
            attrs=aligned,
        )
        compiled = triton.compile(source, target=GPUTarget("cuda", self.capability, 32), options=options)
        limit = SHARED.get(self.capability, SHARED_ELSEWHERE)
        if compiled.metadata.shared > limit:
            raise MemoryError(f"{self.kernel.__name__} wants {compiled.metadata.shared} bytes of shared memory.")
        print(self.kernel.__name__, compiled.metadata.shared)  # noqa: T201


def main(capability: int, dtype: torch.dtype, head_dim: int, heads: int, with_state: bool) -> None:
    for module in (mlstm_kernels, slstm_kernels):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            setattr(module, name, Compiler(getattr(module, name), capability))
    q, k, v = (torch.randn(320, heads, dim, dtype=dtype, requires_grad=True) for dim in (128, 128, 256))
    i, f = (torch.randn(320, heads, requires_grad=True) for _ in range(2))
    shapes = (2, heads, 128, 256), (2, heads, 128), (2, heads)
    state = tuple(torch.randn(shape, requires_grad=True) for shape in shapes) if with_state else None
    h, last = ours.mlstm(q, k, v, i, f, lengths=np.array([300, 20]), state=state, return_state=with_state, reverse=True)
    outputs = [h, *(last or ())]
    torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])
    with torch.no_grad():
        ours.mlstm(q, k, v, i, f, lengths=np.ones(320, int), state=None, return_state=True, reverse=False)
    gates = torch.randn(20, 4, heads, head_dim, requires_grad=True)
    recurrent = torch.randn(4, heads, head_dim, head_dim)
    first = [torch.randn(2, heads, head_dim) for _ in range(4)] if with_state else None
    y, _ = ours.slstm(gates, recurrent, first, lengths=np.array([12, 8]), reverse=False)
    y.sum().backward()


if __name__ == "__main__":
    main(int(sys.argv[1]), getattr(torch, sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5] == "state")
