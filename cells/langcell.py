"""LangCell: a network of cells and one of texts, which tell together whether a text describes a cell.

Zhao et al. 2024 (arXiv:2405.06708). Cells and texts have a vector each, in one space; and the text's network, looking
at all hidden states of a cell, gives the probability that the two belong together.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from ..backbones import Backbone, Memory, TransformerConfig, build, config_to_dict
from ..errors import ConfigError
from ..models import ModelCard, Trainable
from ..sequences import PackedBatch, TextTokenizer, pack
from .tokenizer import RankTokenizer

BATCH_TOKENS = 8192


class LangCell(Trainable):
    """Two transformers, a linear map to a common space behind each, and the matching head.

    Attributes:
        genes: cells to token ids, the first of them the one whose state stands for the cell.
        words: texts to token ids, likewise.
        cell: network of the cells.
        text: network of the texts, with cross-attention to the hidden states of a cell.
        cell_projection: hidden state of a cell's first token to the common space.
        text_projection: the same of a text.
        matching: hidden state of a text's first token to two logits: it is of another cell, of this one.
        most_words: tokens that a text is cut to, None for all.
        name: used for keys such as ``obsm["X_<name>"]``.
        card: data, recipe and metrics.
    """

    def __init__(
        self,
        genes: RankTokenizer,
        words: TextTokenizer,
        cell: TransformerConfig,
        text: TransformerConfig,
        *,
        channels: int = 256,
        name: str = "langcell",
        card: ModelCard | None = None,
    ) -> None:
        """Build a freshly initialised model; ``channels`` are those of the common space.

        Raises:
            ConfigError: a network has fewer embeddings than its tokenizer has tokens, or the texts' does not look at
                hidden states as wide as the cells'.
        """
        super().__init__()
        for what, tokenizer, config in (("cell", genes, cell), ("text", words, text)):
            if config.vocabulary_size < len(tokenizer.vocabulary):
                raise ConfigError(
                    f"The {what} network's vocabulary_size is {config.vocabulary_size}, and its tokenizer has "
                    f"{len(tokenizer.vocabulary)} tokens."
                )
        if text.cross_width != cell.width:
            raise ConfigError(
                f"The text network's cross_width is {text.cross_width}; a cell has {cell.width} channels."
            )
        self.genes, self.words, self.name, self.card = genes, words, name, card or ModelCard()
        self.most_words = text.max_positions
        self.cell, self.text = build(cell), build(text)
        self.cell_projection = nn.Linear(cell.width, channels)
        self.text_projection = nn.Linear(text.width, channels)
        self.matching = nn.Linear(text.width, 2)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.matching.weight.device

    @property
    def networks(self) -> tuple[Backbone, ...]:
        """The network of the cells and that of the texts."""
        return self.cell, self.text

    @property
    def vocabulary_size(self) -> int:
        """Number of the tokens of that tokenizer which has more."""
        return max(len(self.genes.vocabulary), len(self.words.vocabulary))

    def parts(self) -> dict[str, Any]:
        """Tokenizers, networks and the size of the common space, as plain values."""
        return {
            "genes": self.genes.to_dict(),
            "words": self.words.to_dict(),
            "cell": config_to_dict(self.cell.config),
            "text": config_to_dict(self.text.config),
            "channels": self.cell_projection.out_features,
        }

    def read_cells(self, cells: Sequence[NDArray[np.integer]]) -> Memory:
        """Return the hidden states of cells, given as ``genes`` encodes them."""
        return self.cell_states(PackedBatch.from_sequences(cells))

    def cell_states(self, batch: PackedBatch) -> Memory:
        """Return the hidden states of a batch of cells."""
        batch = batch.to(self.device)
        return Memory(self.cell(batch)[0], batch.cu_seqlens)

    def embed_cells(self, cells: Memory) -> Float[Tensor, "cells channels"]:
        """Return a vector of length one for each cell."""
        return F.normalize(self.cell_projection(cells.hidden[cells.cu_seqlens[:-1]]), dim=-1)

    def embed_texts(self, texts: Sequence[str]) -> Float[Tensor, "texts channels"]:
        """Return a vector of length one for each text."""
        return self.text_vectors(PackedBatch.from_sequences([self.words_of(text) for text in texts]))

    def text_vectors(self, batch: PackedBatch) -> Float[Tensor, "texts channels"]:
        """Return a vector of length one for each text of a batch."""
        batch = batch.to(self.device)
        first = self.text(batch)[0][batch.cu_seqlens[:-1]]
        return F.normalize(self.text_projection(first), dim=-1)

    def match(
        self, cells: Memory, texts: Sequence[str], *, batch_tokens: int = BATCH_TOKENS
    ) -> Float[Tensor, "cells texts"]:
        """Return the probability that each text is of each cell.

        Every pair is a pass of the text's network; ``batch_tokens`` are the text tokens of one batch of pairs.
        """
        words = [self.words_of(text) for text in texts]
        pairs = [(cell, text) for cell in range(len(cells.cu_seqlens) - 1) for text in range(len(words))]
        found = cells.hidden.new_zeros(len(pairs))
        for group in pack([len(words[text]) for _, text in pairs], batch_tokens):
            chosen = [pairs[i] for i in group]
            batch = PackedBatch.from_sequences([words[text] for _, text in chosen])
            logits = self.match_logits(cells, [cell for cell, _ in chosen], batch)
            index = torch.tensor(group, device=self.device)
            found = found.index_put((index,), logits.softmax(-1)[:, 1].to(found.dtype))
        return found.view(len(cells.cu_seqlens) - 1, len(words))

    def match_logits(self, cells: Memory, rows: Sequence[int], batch: PackedBatch) -> Float[Tensor, "pairs two"]:
        """Return for each text of a batch two logits: it is of another cell, it is of the one numbered in ``rows``."""
        states = torch.split(cells.hidden, cells.cu_seqlens.diff().tolist())
        lengths = torch.tensor([len(states[cell]) for cell in rows], device=self.device)
        memory = Memory(torch.cat([states[cell] for cell in rows]), F.pad(lengths.cumsum(0), (1, 0)))
        batch = batch.to(self.device)
        logits: Tensor = self.matching(self.text(batch, memory=memory)[0][batch.cu_seqlens[:-1]])
        return logits

    def words_of(self, text: str) -> NDArray[np.int32]:
        """Token ids of a text, cut so that it fits the positions; its end token stays."""
        ids = self.words.encode(text)
        most = self.most_words
        return ids if most is None or len(ids) <= most else np.concatenate([ids[: most - 1], ids[-1:]])

    def save(self, folder: str | Path, *, format: str | None = None) -> None:
        """Write the model to ``folder``: in our own format, or as its authors have it (``format="langcell"``).

        Raises:
            OutputError: the folder cannot be written.
            ConfigError: there is no such format, or it cannot hold this model.
        """
        from .langcell_files import save, save_as  # they build models, so they import this module

        if format is None:
            save(self, folder)
        else:
            save_as(self, folder, format)

    @classmethod
    def load(
        cls, folder: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
    ) -> LangCell:
        """Read a model from a folder of ours or of its authors, in evaluation mode.

        Beside the authors' own files theirs needs a table of genes (gene_table.tsv, Geneformer's of 30M cells) and the
        vocabulary of PubMedBERT (vocab.txt in text_bert).

        Args:
            folder: what ``save`` wrote, or a folder with cell_bert, text_bert, cell_proj.bin, text_proj.bin and
                ctm_head.bin.
            device: where the weights go.
            dtype: of the weights; None keeps the stored one.

        Raises:
            InputError: a file is missing or damaged, or tensors are missing, unknown or misshapen.
        """
        from .langcell_files import load

        return load(folder, device=device, dtype=dtype)
