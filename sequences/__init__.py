"""What a batch is: vocabulary, tokenizer protocol, packed batch, packing, text tokenizers, token stores, text files."""

from .batch import PackedBatch, SequenceShare, share_batch
from .blanks import Blanked, blanked, own_part, require_blanks, without_blanks
from .chunks import Chunk, Encoded, RecordChunk, Sequenced, Unusable, encode_records, in_chunks
from .files import check_file, check_writable, open_text, read_blocks, read_lines, replacing
from .filling import fills_in, move_spans_behind, span_masks
from .ids import IdTokenizer
from .packing import pack, unused_share
from .records import OnError, Record, Records, texts_of
from .spans import Span, Spanned, SpannedBatch, cut_spans, has_spans, spans_in, token_lengths, token_spans
from .store import TokenStore
from .text import TextTokenizer
from .tokenizer import Tokenizer, tokenizer_class, tokenizer_from_dict, tokenizer_to_dict
from .tokenizing import read_unusable, tokenize_files
from .vocabulary import Vocabulary

__all__ = [
    "Blanked",
    "Chunk",
    "Encoded",
    "RecordChunk",
    "Sequenced",
    "Unusable",
    "encode_records",
    "in_chunks",
    "read_blocks",
    "read_unusable",
    "tokenize_files",
    "IdTokenizer",
    "OnError",
    "PackedBatch",
    "Record",
    "Records",
    "SequenceShare",
    "Span",
    "Spanned",
    "SpannedBatch",
    "TextTokenizer",
    "TokenStore",
    "Tokenizer",
    "Vocabulary",
    "blanked",
    "check_file",
    "check_writable",
    "cut_spans",
    "fills_in",
    "has_spans",
    "move_spans_behind",
    "open_text",
    "own_part",
    "pack",
    "read_lines",
    "replacing",
    "require_blanks",
    "share_batch",
    "span_masks",
    "spans_in",
    "texts_of",
    "token_lengths",
    "token_spans",
    "tokenizer_class",
    "tokenizer_from_dict",
    "tokenizer_to_dict",
    "unused_share",
    "without_blanks",
]
