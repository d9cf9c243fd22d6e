"""Our mLSTM on a GPU beside mlstm_kernels' xl_chunk and flash-linear-attention's simple_gla.

    python benchmarks/kernels_gpu.py

65,536 tokens in bfloat16, 16 heads, qk 128, v 256 (width 4096), as sequences of 512 to 65,536. Printed: medians by CUDA
events of forward and of forward+backward, in ms, and the share of the device's peak arithmetic and bandwidth that the
least work there is comes to: products at chunks of 64, and each input, output and gradient read or written once. All
three are held against the same work. simple_gla has no normaliser and no input gate, and the backward of xl_chunk is
not the gradient of its forward. Peers that are not installed are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from statistics import median

import torch
from machine import describe
from processive.kernels import chosen_backend, mlstm
from torch import Tensor
from torch.nn.functional import logsigmoid

TOKENS, HEADS, QK, V, CHUNK = 65_536, 16, 128, 256, 64
PEAKS = {"H100": (989e12, 3.35e12), "H200": (989e12, 4.8e12)}  # dense bfloat16 FLOP/s, bytes/s (the SXM modules)
FORWARD = TOKENS * HEADS * (4 * QK * V + CHUNK * (QK + V)), TOKENS * HEADS * (4 * QK + 4 * V + 8)  # FLOP, bytes
BOTH = FORWARD[0] + TOKENS * HEADS * (8 * QK * V + CHUNK * (3 * QK + 2 * V)), FORWARD[1] * 3

Run = tuple[str, Callable[[], Tensor], list[Tensor]]


def runs(length: int) -> Iterator[Run]:
    """Yield name, forward call and inputs of each kernel; they see the same numbers in their own layouts."""
    generator = torch.Generator("cuda").manual_seed(0)
    dims = [(HEADS, QK), (HEADS, QK), (HEADS, V), (HEADS,), (HEADS,)]
    drawn = [torch.randn(TOKENS, *dim, device="cuda", generator=generator) for dim in dims]
    drawn[4] += 3
    drawn = [x.bfloat16() if x.ndim == 3 else x for x in drawn]

    def leaves(change: Callable[[Tensor], Tensor]) -> list[Tensor]:
        return [change(x).contiguous().requires_grad_() for x in drawn]

    packed = leaves(lambda x: x)
    cu_seqlens = torch.arange(0, TOKENS + 1, length)
    yield "processive", lambda: mlstm(*packed, cu_seqlens=cu_seqlens, backend="triton"), packed
    if find_spec("mlstm_kernels"):
        from mlstm_kernels.torch.chunkwise.triton_xl_chunk import mlstm_chunkwise__xl_chunk as xl_chunk

        heads_first = leaves(lambda x: x.unflatten(0, (-1, length)).transpose(1, 2))
        yield (
            "mlstm_kernels xl_chunk",
            lambda: xl_chunk(*heads_first, chunk_size=128, autocast_kernel_dtype=torch.bfloat16),
            heads_first,
        )
    if find_spec("fla"):
        from fla.ops.simple_gla import chunk_simple_gla

        q, k, v, _, f = batch = leaves(lambda x: x.unflatten(0, (-1, length)))
        yield "fla simple_gla", lambda: chunk_simple_gla(q, k, v, g=logsigmoid(f))[0], [*batch[:3], f]


def milliseconds(call: Callable[[], object], repeats: int = 20) -> float:
    """Return the median time of a call, by events on the device."""
    for _ in range(5):
        call()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return median(times)


def share(work: tuple[int, int], time: float, peaks: tuple[float, float] | None) -> str:
    if peaks is None:
        return "| |"
    return "|".join(f" {100 * amount / (time * 1e-3) / peak:.0f}% " for amount, peak in zip(work, peaks, strict=True))


def installed(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"{package} absent"


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("kernels_gpu.py needs a GPU, and torch sees none here.")
    device = torch.cuda.get_device_name()
    peaks = next((peak for name, peak in PEAKS.items() if name in device), None)
    packages = ", ".join(installed(name) for name in ("triton", "mlstm_kernels", "flash-linear-attention"))
    print(f"{device}; {describe()}, {packages}; auto is {chosen_backend('mlstm', 'cuda', torch.bfloat16)}\n")
    print("| length | kernel | forward, ms | FLOP/s | bandwidth | forward+backward, ms | FLOP/s | bandwidth |")
    print("|---|---|---|---|---|---|---|---|")
    for length in (512, 2048, 8192, 65_536):
        for name, forward, inputs in runs(length):
            with torch.no_grad():
                first = milliseconds(forward)
            dh = torch.ones_like(forward())
            both = milliseconds(
                lambda forward=forward, inputs=inputs, dh=dh: torch.autograd.grad(forward(), inputs, dh)
            )
            print(f"| {length:,} | {name} | {first:.2f} |{share(FORWARD, first, peaks)}", end="")
            print(f"| {both:.2f} |{share(BOTH, both, peaks)}|", flush=True)


if __name__ == "__main__":
    main()
