"""Single cells: AnnData to ranked genes, embeddings and back into AnnData."""

from .draw import draw_umap
from .graph import neighbor_graph
from .langcell import LangCell
from .langcell_pairs import CellTexts
from .matrix import Expression, find_expression
from .readers import read, write_h5ad
from .tasks import chunks, embed, make_tokenizer, score, tokenize
from .tokenizer import RankTokenizer
from .vocabulary import GeneMatch, GeneVocabulary

__all__ = [
    "CellTexts",
    "Expression",
    "GeneMatch",
    "GeneVocabulary",
    "LangCell",
    "RankTokenizer",
    "chunks",
    "draw_umap",
    "embed",
    "find_expression",
    "make_tokenizer",
    "neighbor_graph",
    "read",
    "score",
    "tokenize",
    "write_h5ad",
]
