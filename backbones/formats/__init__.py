"""Foreign checkpoints: one table per format, read both ways."""

from .esm import FAIR_ESM, HF_ESM, NUCLEOTIDE_TRANSFORMER_V2
from .esmc import ESMC, HF_ESMC
from .table import Checkpoint, CheckpointFormat, Entry

FORMATS: tuple[CheckpointFormat, ...] = (FAIR_ESM, HF_ESM, NUCLEOTIDE_TRANSFORMER_V2, ESMC, HF_ESMC)

__all__ = ["FORMATS", "Checkpoint", "CheckpointFormat", "Entry"]
