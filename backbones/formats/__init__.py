"""Foreign checkpoints: one table per format, read both ways."""

from .bert import HF_BERT
from .chem_xlstm import CHEM_XLSTM
from .dna_xlstm import DNA_XLSTM
from .esmc import ESMC, HF_ESMC
from .fair_esm import FAIR_ESM
from .hf_esm import HF_ESM, NUCLEOTIDE_TRANSFORMER_V2
from .llama import HF_LLAMA
from .prot_xlstm import PROT_XLSTM
from .proteinglm import PROTEINGLM
from .table import Checkpoint, CheckpointFormat, Entry
from .xlstm import XLSTM_CUDA, XLSTM_PACKAGE
from .xlstm_large import HF_XLSTM, XLSTM_LARGE

FORMATS: tuple[CheckpointFormat, ...] = (
    FAIR_ESM,
    HF_ESM,
    NUCLEOTIDE_TRANSFORMER_V2,
    ESMC,
    HF_ESMC,
    HF_LLAMA,
    HF_BERT,
    PROTEINGLM,
    XLSTM_PACKAGE,
    XLSTM_CUDA,
    XLSTM_LARGE,
    HF_XLSTM,
    PROT_XLSTM,
    DNA_XLSTM,
    CHEM_XLSTM,
)

__all__ = ["FORMATS", "Checkpoint", "CheckpointFormat", "Entry"]
