"""Foreign checkpoints: one table per format, read both ways."""

from .table import Checkpoint, CheckpointFormat, Entry

FORMATS: tuple[CheckpointFormat, ...] = ()

__all__ = ["FORMATS", "Checkpoint", "CheckpointFormat", "Entry"]
