"""DNA and proteins: tokenizers, FASTA, the other strand, variant effects, and the verbs."""

from .contacts import contacts
from .graph import contact_graph
from .homologs import homolog_batch, homolog_context
from .letters import LetterTokenizer
from .readers import chunks, read, write_fasta
from .sequence import AMINO_ACIDS, BASES, guess_alphabet, reverse_complement, translate
from .tasks import embed, generate, logits, make_tokenizer, score, tokenize
from .tokenizer import DNATokenizer, KmerTokenizer, ProteinTokenizer
from .variants import all_single_variants, apply_variant, parse_variant, score_variants

__all__ = [
    "AMINO_ACIDS",
    "BASES",
    "DNATokenizer",
    "KmerTokenizer",
    "LetterTokenizer",
    "ProteinTokenizer",
    "all_single_variants",
    "apply_variant",
    "chunks",
    "contact_graph",
    "contacts",
    "embed",
    "generate",
    "guess_alphabet",
    "homolog_batch",
    "homolog_context",
    "logits",
    "make_tokenizer",
    "parse_variant",
    "read",
    "reverse_complement",
    "score",
    "score_variants",
    "tokenize",
    "translate",
    "write_fasta",
]
