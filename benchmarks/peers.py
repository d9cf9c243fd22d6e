"""What benchmarks/kernels.py times us beside: mlstm_kernels, xlstm and torch, each in its fastest CPU configuration.

Every function takes our layout (packed tokens) and returns a call that is ready to be timed; whatever the peer needs
done to its inputs before it starts (transposing, padding) is done here and costs it nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from mlstm_kernels.torch import get_mlstm_kernel
from torch import Tensor, nn
from xlstm import mLSTMBlockConfig, mLSTMLayerConfig, xLSTMLMModel, xLSTMLMModelConfig
from xlstm.blocks.slstm.cell import sLSTMCell, sLSTMCellConfig

CHUNK = 64  # the fastest of the peer's chunk lengths on a CPU


def mlstm_kernel(name: str, inputs: list[Tensor], sequences: int = 1) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """Return a forward pass of sequences of one length, [tokens, heads, v_dim], and the leaves that it reads."""
    leaves = [
        x.detach().unflatten(0, (sequences, -1)).transpose(1, 2).contiguous().requires_grad_(x.requires_grad)
        for x in inputs
    ]
    kernel = get_mlstm_kernel(f"chunkwise--{name}")
    q, k, v, i, f = leaves
    return lambda: kernel(q=q, k=k, v=v, i=i, f=f, chunk_size=CHUNK).transpose(1, 2).flatten(0, 1), leaves


def slstm_cell(gates: Tensor, recurrent: Tensor, sequences: int) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """Return a forward pass of the ``vanilla`` backend on sequences of one length, and the leaves that it reads."""
    tokens, _, heads, head_dim = gates.shape
    cell = sLSTMCell(sLSTMCellConfig(hidden_size=heads * head_dim, num_heads=heads, backend="vanilla", dtype="float32"))
    with torch.no_grad():
        cell._bias_.zero_()
        cell._recurrent_kernel_.copy_(recurrent.detach().permute(1, 0, 2, 3).reshape_as(cell._recurrent_kernel_))
    raw = gates.detach().reshape(sequences, tokens // sequences, -1).clone().requires_grad_(gates.requires_grad)

    def forward() -> Tensor:
        y: Tensor = cell(raw)[0]  # [sequences, heads, length, head_dim]
        return y.transpose(1, 2).reshape(tokens, heads, head_dim)

    return forward, [raw, cell._recurrent_kernel_]


def xlstm_model(vocabulary: int, width: int, depth: int, heads: int, context: int) -> nn.Module:
    """Return the xlstm package's language model of mLSTM blocks."""
    torch.manual_seed(0)
    layer = mLSTMLayerConfig(conv1d_kernel_size=4, qkv_proj_blocksize=4, num_heads=heads)
    return xLSTMLMModel(
        xLSTMLMModelConfig(
            mlstm_block=mLSTMBlockConfig(mlstm=layer),
            context_length=context,
            num_blocks=depth,
            embedding_dim=width,
            vocab_size=vocabulary,
        )
    )


def sdpa(
    inputs: list[Tensor], lengths: Tensor, *, causal: bool
) -> tuple[Callable[[], Tensor], list[Tensor], Callable[[Tensor], Tensor]]:
    """Return attention on the batch padded to its longest, its leaves, and what cuts real tokens out of its output.

    A causal batch padded on the right needs no mask for its real tokens to be right, and is faster without.
    """
    longest = int(lengths.max())
    real = torch.arange(longest) < lengths[:, None]

    def padded(x: Tensor) -> Tensor:
        out = x.new_zeros(*real.shape, *x.shape[1:])
        out[real] = x.detach()
        return out.transpose(1, 2).contiguous().requires_grad_(x.requires_grad)

    leaves = [padded(x) for x in inputs]
    mask = None if causal or bool(real.all()) else real[:, None, None].expand(-1, 1, longest, longest).contiguous()

    def forward() -> Tensor:
        return F.scaled_dot_product_attention(*leaves, attn_mask=mask, is_causal=causal)

    return forward, leaves, lambda y: y.transpose(1, 2)[real]
