"""xLSTM (Beck et al. 2024, arXiv:2405.04517) and its 7B form (Beck et al. 2025, arXiv:2503.13427)."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..sequences import PackedBatch
from .backbone import Backbone
from .layers import make_norm
from .state import BackboneState
from .strands import backwards
from .xlstm_blocks import CappedMLSTMBlock, Context, MLSTMBlock, SLSTMBlock
from .xlstm_config import XLSTMConfig

SINUSOID_BASE = 100_000.0
BLOCKS: dict[str, type[nn.Module]] = {"mlstm": MLSTMBlock, "slstm": SLSTMBlock, "mlstm-7b": CappedMLSTMBlock}


class XLSTM(Backbone):
    """The network of an ``XLSTMConfig``."""

    config: XLSTMConfig

    def __init__(self, config: XLSTMConfig) -> None:
        super().__init__(config)
        self.blocks = nn.ModuleList(BLOCKS[kind](config, index) for index, kind in enumerate(config.kinds))
        last, norm = ("mlstm-7b", "rms") if set(config.kinds) == {"mlstm-7b"} else ("mlstm", "layer")
        self.norm: nn.Module = nn.Identity()
        if config.post_blocks_norm:
            self.norm = make_norm(norm, config.width, config.eps(last), offset=config.norm_offset)
        self.position_scale: nn.Parameter | None = None
        if config.positions is not None:
            self.position_scale = nn.Parameter(torch.full((1,), config.width**-0.5))

    def embed(self, batch: PackedBatch) -> Float[Tensor, "tokens width"]:
        """Return the embedding of each token, with its position where the configuration asks for it."""
        x = super().embed(batch)
        if self.position_scale is None:
            return x
        return x + self.position_scale * sinusoids(batch.positions, x.shape[1]).to(self.position_scale.dtype)

    def context(self, batch: PackedBatch, state: BackboneState | None, *, reuse_state: bool = False) -> Context:
        """Return boundaries and positions; without rotary positions, order is all that an xLSTM knows of them.

        Raises:
            ConfigError: the heads are not divisible by the processes that share the batch.
        """
        positions, share = batch.positions, batch.share
        if share is not None:
            share.check_heads(self.config.heads)
        if self.config.rotary is None or self.config.direction == "causal":
            return Context(batch.cu_seqlens, positions, positions, share)
        turned = batch.whole.positions[backwards(batch.cu_seqlens)]
        return Context(batch.cu_seqlens, positions, turned if share is None else share.cut(turned), share)


def sinusoids(positions: Int[Tensor, " tokens"], width: int) -> Float[Tensor, "tokens width"]:
    """Return the sines, then the cosines, of positions (Vaswani et al. 2017), with base 100,000."""
    precise = torch.float32 if positions.device.type == "mps" else torch.float64  # Apple GPUs have no float64
    frequencies = SINUSOID_BASE ** (-torch.arange(width // 2, device=positions.device, dtype=precise) / (width // 2))
    angles = positions.to(precise)[:, None] * frequencies
    return torch.cat((angles.sin(), angles.cos()), dim=1)
