"""Compile every Triton kernel for an NVIDIA GPU that need not be there: python compile_triton.py 90.

Run by test_triton.py without TRITON_INTERPRET. Launches are caught on their way and their arguments' types compiled.
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

SMALLEST = 99 * 1024  # bytes of shared memory: consumer cards
TYPES = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
}
OPTIONS = "num_warps", "num_stages"


def kind(x: Any) -> str:
    """Return Triton's name for the type of an argument."""
    if isinstance(x, torch.Tensor):
        return TYPES[x.dtype]
    return {type(None): "*fp32", int: "i32", float: "fp32"}[type(x)]


class Compiler:
    """Stands in for a kernel: a launch compiles it."""

    def __init__(self, kernel: Any, capability: int) -> None:
        self.kernel, self.capability = kernel, capability

    def __getitem__(self, grid: Any) -> Any:
        return self.launch

    def launch(self, *arguments: Any, **constants: Any) -> None:
        options = {name: constants.pop(name) for name in OPTIONS if name in constants}
        names = self.kernel.arg_names
        signature = {name: kind(x) for name, x in zip(names, arguments, strict=False)}
        aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if signature[name][0] == "*"}
        signature |= dict.fromkeys(constants, "constexpr")
        source = ASTSource(
            fn=self.kernel,
            signature={name: signature[name] for name in names},
            constexprs={(names.index(name),): value for name, value in constants.items()},
            attrs=aligned,
        )
        compiled = triton.compile(source, target=GPUTarget("cuda", self.capability, 32), options=options)
        limit = SMALLEST if self.capability != 90 else 227 * 1024
        if compiled.metadata.shared > limit:
            raise MemoryError(f"{self.kernel.__name__} wants {compiled.metadata.shared} bytes of shared memory.")
        print(self.kernel.__name__, compiled.metadata.shared)


def main(capability: int) -> None:
    for module in (mlstm_kernels, slstm_kernels):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            setattr(module, name, Compiler(getattr(module, name), capability))
    lengths = np.array([300, 20])
    for dtype in (torch.bfloat16, torch.float32):
        q, k, v = (torch.randn(320, 1, dim, dtype=dtype, requires_grad=True) for dim in (128, 128, 256))
        i, f = (torch.randn(320, 1, requires_grad=True) for _ in range(2))
        shapes = (2, 1, 128, 256), (2, 1, 128), (2, 1)
        state = tuple(torch.randn(shape, requires_grad=True) for shape in shapes)
        h, last = ours.mlstm(q, k, v, i, f, lengths=lengths, state=state, return_state=True, reverse=True)
        torch.autograd.backward([h, *last], [torch.ones_like(x) for x in (h, *last)])
    with torch.no_grad():
        ours.mlstm(q, k, v, i, f, lengths=np.ones(320, int), state=None, return_state=True, reverse=False)
    for dim in (64, 130):
        gates, recurrent = torch.randn(20, 4, 1, dim, requires_grad=True), torch.randn(4, 1, dim, dim)
        first = [torch.randn(2, 1, dim) for _ in range(4)]
        y, _ = ours.slstm(gates, recurrent, first, lengths=np.array([12, 8]), reverse=False)
        y.sum().backward()


if __name__ == "__main__":
    main(int(sys.argv[1]))
