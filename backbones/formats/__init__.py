"""Foreign checkpoints: one table per format, read both ways."""

from .bert import HF_BERT
from .llama import HF_LLAMA
from .proteinglm import PROTEINGLM
from .table import Checkpoint, CheckpointFormat, Entry

FORMATS: tuple[CheckpointFormat, ...] = (HF_LLAMA, HF_BERT, PROTEINGLM)

__all__ = ["FORMATS", "Checkpoint", "CheckpointFormat", "Entry"]
