import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from processive.errors import ShapeError
from processive.sequences import PackedBatch


def test_packs_and_splits():
    batch = PackedBatch.from_sequences([[5, 6, 7], [], [8]])
    assert batch.tokens.tolist() == [5, 6, 7, 8]
    assert batch.cu_seqlens.tolist() == [0, 3, 3, 4]
    assert batch.positions.tolist() == [0, 1, 2, 0]
    assert batch.sequence_ids.tolist() == [0, 0, 0, 2]
    assert [part.tolist() for part in batch.split(batch.tokens)] == [[5, 6, 7], [], [8]]
    assert batch.max_length == 3


def test_empty():
    batch = PackedBatch.from_sequences([])
    assert len(batch) == 0
    assert batch.max_length == 0


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_round_trip(side, rng):
    sequences = [rng.integers(4, 9, size=n) for n in (3, 1, 5)]
    ids = torch.full((3, 5), 1)
    mask = torch.zeros(3, 5, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        where = slice(0, len(sequence)) if side == "right" else slice(5 - len(sequence), 5)
        ids[row, where] = torch.from_numpy(sequence)
        mask[row, where] = 1
    batch = PackedBatch.from_padded(ids, mask)
    assert batch.tokens.tolist() == np.concatenate(sequences).tolist()
    back, kept = batch.to_padded(pad=1)
    again = PackedBatch.from_padded(back, kept)
    assert torch.equal(again.tokens, batch.tokens)
    assert torch.equal(again.cu_seqlens, batch.cu_seqlens)


def test_positions_must_fit():
    with pytest.raises((ShapeError, TypeCheckError)):  # the annotation checker, on in tests, may speak first
        PackedBatch(torch.zeros(3, dtype=torch.long), torch.tensor([0, 3]), torch.zeros(2, dtype=torch.long))
