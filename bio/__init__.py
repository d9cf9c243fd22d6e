"""DNA and proteins: tokenizers, FASTA, the other strand, variant effects, and the verbs."""

from .contacts import contacts
from .frames import in_frames
from .graph import contact_graph
from .homologs import homolog_batch, homolog_context
from .instructions import (
    protein_text,
    read_superfamilies,
    superfamily_prompt,
    superfamily_text,
    write_instructions,
)
from .letters import LetterTokenizer
from .readers import chunks, read, write_fasta
from .sequence import AMINO_ACIDS, BASES, guess_alphabet, reverse_complement, translate
from .spans import read_spans, spans_by_record
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
    "in_frames",
    "logits",
    "make_tokenizer",
    "parse_variant",
    "protein_text",
    "read",
    "read_spans",
    "read_superfamilies",
    "reverse_complement",
    "score",
    "score_variants",
    "spans_by_record",
    "superfamily_prompt",
    "superfamily_text",
    "tokenize",
    "translate",
    "write_fasta",
    "write_instructions",
]
