"""xLSTM (Beck et al. 2024, arXiv:2405.04517) and its 7B form (Beck et al. 2025, arXiv:2503.13427)."""

from __future__ import annotations

from torch import nn

from ..sequences import PackedBatch
from .backbone import Backbone
from .layers import make_norm
from .state import BackboneState
from .strands import backwards
from .xlstm_blocks import CappedMLSTMBlock, Context, MLSTMBlock, SLSTMBlock
from .xlstm_config import XLSTMConfig

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

    def context(self, batch: PackedBatch, state: BackboneState | None, *, reuse_state: bool = False) -> Context:
        """Return boundaries and positions; without rotary positions, order is all that an xLSTM knows of them."""
        positions = batch.positions
        if self.config.rotary is None or self.config.direction == "causal":
            return Context(batch.cu_seqlens, positions, positions)
        return Context(batch.cu_seqlens, positions, positions[backwards(batch.cu_seqlens)])
