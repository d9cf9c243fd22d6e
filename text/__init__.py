"""Text, with instructions among it: readers, and the verbs of models whose tokenizer is of text."""

from .readers import TextRecord, chunks, read
from .tasks import embed, generate, make_tokenizer, score, tokenize

__all__ = [
    "TextRecord",
    "chunks",
    "embed",
    "generate",
    "make_tokenizer",
    "read",
    "score",
    "tokenize",
]
