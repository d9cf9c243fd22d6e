"""Cells with a text for each, as LangCell learns them: which text is of which cell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn

from ..errors import ConfigError, InputError
from ..models import Trainable
from ..sequences import PackedBatch
from ..training.objectives import contrastive_loss, hard_negatives, matching_loss
from ..training.taught import Taught, TaughtObjective, Tokens, hashed
from .langcell import LangCell
from .tasks import tokenize

if TYPE_CHECKING:
    from anndata import AnnData
else:
    AnnData = Any


class CellTexts(Taught):
    """Pairs of a cell and a text, to train a ``LangCell`` on.

    Two of its four losses, added (Zhao et al. 2024): the vectors of a cell and of its text are drawn together and those
    of the batch's others apart (``contrastive_loss``), and the text's network, looking at a cell, tells pairs from
    similar wrong ones of the batch (``matching_loss``). All cells with one text are its partners. ``batch_tokens``, of
    cells and texts together, says among how many a cell has to find its text. The other two losses are of cells alone:
    masked genes, and two views of a cell.

    >>> data = CellTexts.encode(model, adata, [f"cell type: {name}" for name in adata.obs["cell_type"]])
    >>> training.train(model, data, TrainingConfig(epochs=3, batch_tokens=65536), out="runs/langcell")

    Args:
        cells: token ids of each cell, by ``model.genes``.
        texts: token ids of the text of each cell, by ``model.words``.
        temperature: of the softmax over the pairs of a batch.

    Raises:
        InputError: cells and texts disagree in number, or one is empty, with its number.
        ConfigError: the temperature is not positive.
    """

    def __init__(self, cells: Sequence[Tokens], texts: Sequence[Tokens], *, temperature: float = 0.05) -> None:
        if len(cells) != len(texts):
            raise InputError(f"There are {len(cells)} cells and {len(texts)} texts; each cell has one.")
        for number, pair in enumerate(zip(cells, texts, strict=True), 1):
            if not all(len(part) for part in pair):
                raise InputError("A cell or its text has no token.", record=number)
        if not temperature > 0:
            raise ConfigError(f"The temperature is {temperature}; it must be positive.")
        count = len(cells)
        super().__init__([*cells, *texts], [np.array([row, row + count]) for row in range(count)])
        self.temperature = temperature
        keys = [np.asarray(text, np.int64).tobytes() for text in texts]
        numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
        self.groups = np.array([numbers[key] for key in keys], np.int64)

    @classmethod
    def encode(cls, model: LangCell, adata: AnnData, texts: Sequence[str], *, temperature: float = 0.05) -> CellTexts:
        """Tokenize cells and their texts; cells without a known gene are left out, with one warning.

        Raises:
            InputError: as ``CellTexts``, or as ``tokenize``.
        """
        if len(texts) != adata.n_obs:
            raise InputError(f"There are {adata.n_obs} cells and {len(texts)} texts; each cell has one.")
        found = tokenize(adata, model.genes)
        words = {text: model.words_of(text) for text in dict.fromkeys(texts)}
        pairs = [(cell, words[text]) for cell, text in zip(found, texts, strict=True) if len(cell)]
        return cls([cell for cell, _ in pairs], [text for _, text in pairs], temperature=temperature)

    def check(self, model: Trainable) -> None:
        """Raise ConfigError where the model is no LangCell, or of other tokenizers."""
        if not isinstance(model, LangCell):
            raise ConfigError(f"Cells with texts are learned by a LangCell, and {model.name} is none.")
        half = len(self)
        for what, parts, tokenizer in (
            ("cell", self.sequences[:half], model.genes),
            ("text", self.sequences[half:], model.words),
        ):
            highest = max(int(np.max(part)) for part in parts)
            if highest >= len(tokenizer.vocabulary):
                raise ConfigError(f"A {what} has the token {highest}, and {model.name} was made for other tokens.")

    def untaught(self, model: Trainable) -> list[nn.Module]:
        """Nothing: every part of the model is reached."""
        return []

    def objective(self, batch: PackedBatch, rows: NDArray[np.int64], model: Trainable) -> PairObjective:
        """Return the pairs in a batch, whose sequences are a cell and its text by turns."""
        parts = batch.split(batch.tokens)
        groups = torch.from_numpy(self.groups[rows[::2]])
        cells, texts = PackedBatch.from_sequences(parts[::2]), PackedBatch.from_sequences(parts[1::2])
        return PairObjective(cells, texts, groups, self.temperature)

    def digest(self) -> bytes:
        """A hash of where the texts begin and of the temperature."""
        return hashed(np.array([len(part) for part in self.sequences]), f"cell texts {self.temperature}")


@dataclass(frozen=True)
class PairObjective(TaughtObjective):
    """The pairs of one batch.

    Attributes:
        cells: the cells.
        texts: the text of each.
        groups: a number for each pair, [pairs]; those with one number have the same text.
        temperature: see ``CellTexts``.
    """

    cells: PackedBatch
    texts: PackedBatch
    groups: Int[Tensor, " pairs"]
    temperature: float

    @property
    def weight(self) -> float:
        """Number of pairs."""
        return float(len(self.cells))

    def loss_sum(self, model: Trainable) -> Float[Tensor, ""]:
        """Return the sum over the pairs of both losses (nats).

        Wrong partners are drawn by torch's own generator, which the loop seeds for each batch of a step; in evaluation
        they are the same every time.
        """
        assert isinstance(model, LangCell)
        states = model.cell_states(self.cells)
        cells, texts = model.embed_cells(states), model.text_vectors(self.texts)
        contrast = contrastive_loss(cells, texts, temperature=self.temperature, groups=self.groups)
        generator = torch.default_generator if model.training else torch.Generator().manual_seed(0)
        drawn = hard_negatives(cells, texts, generator, temperature=self.temperature, groups=self.groups)
        pairs = [(row, row) for row in range(len(self.cells))]
        wrong = [(cell, text) for cell, text in enumerate(drawn[0].tolist()) if text >= 0]
        wrong += [(cell, text) for text, cell in enumerate(drawn[1].tolist()) if cell >= 0]
        tokens = self.texts.split(self.texts.tokens)
        asked = PackedBatch.from_sequences([tokens[text] for _, text in (*pairs, *wrong)])
        logits = model.match_logits(states, [cell for cell, _ in (*pairs, *wrong)], asked).float()
        matched, unmatched = torch.split(logits[:, 1] - logits[:, 0], [len(pairs), len(wrong)])
        return len(pairs) * (contrast + matching_loss(matched, unmatched))
