"""Foreign checkpoints: one table per format, read both ways."""

from .table import Checkpoint, CheckpointFormat, Entry
from .xlstm import XLSTM_PACKAGE
from .xlstm_large import HF_XLSTM, XLSTM_LARGE

FORMATS: tuple[CheckpointFormat, ...] = (XLSTM_PACKAGE, XLSTM_LARGE, HF_XLSTM)

__all__ = ["FORMATS", "Checkpoint", "CheckpointFormat", "Entry"]
