"""The order of the data, and how it is cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processive.errors import InputError
from processive.sequences import TokenStore, unused_share
from processive.training.batches import epoch_batches, seed_of
from processive.training.data import Pieces


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=80), st.integers(1, 50), st.integers(0, 5))
def test_an_epoch_holds_every_sequence_once(lengths, batch_tokens, epoch):
    lengths = np.array(lengths)
    batches = epoch_batches(lengths, batch_tokens=batch_tokens, seed=1, epoch=epoch)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    assert all(lengths[batch].sum() <= batch_tokens or len(batch) == 1 for batch in batches)


def test_order_is_a_function_of_seed_and_epoch():
    lengths = np.arange(1, 100)

    def order(seed, epoch):
        return np.concatenate(epoch_batches(lengths, batch_tokens=200, seed=seed, epoch=epoch)).tolist()

    assert order(0, 3) == order(0, 3)
    assert order(0, 3) != order(0, 4) != order(1, 4)


def test_batches_mix_lengths_and_leave_little_room():
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(3.6, 0.4, 20000).astype(np.int64) + 2  # about that of SMILES
    batches = epoch_batches(lengths, batch_tokens=4096, seed=0, epoch=0)
    assert unused_share(lengths, [batch.tolist() for batch in batches], 4096) < 0.05
    means = [lengths[batch].mean() for batch in batches[:-1]]
    assert np.std(means) < 3 * lengths.std() / np.sqrt(4096 / lengths.mean())


def test_pieces_cut_long_sequences_and_lose_nothing():
    pieces = Pieces([[1, 2, 3, 4, 5], [], [6], [7, 8, 9, 10]], max_length=2)
    assert [pieces[i].tolist() for i in range(len(pieces))] == [[1, 2], [3, 4], [5], [6], [7, 8], [9, 10]]
    assert pieces.lengths.tolist() == [2, 2, 1, 1, 2, 2]


def test_pieces_of_a_store_equal_those_of_a_list(tmp_path):
    sequences = [np.arange(n) % 7 for n in (3, 9, 1)]
    store = TokenStore.write(tmp_path / "store", sequences, vocabulary_size=7)
    one, other = Pieces(sequences, max_length=4), Pieces(store, max_length=4)
    assert one.lengths.tolist() == other.lengths.tolist() and one.fingerprint() == other.fingerprint()
    batch = other.batch(np.array([1, 0]), vocabulary_size=7)
    assert batch.tokens.tolist() == [0, 1, 2, 3, 0, 1, 2] and batch.positions.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert Pieces([sequences[0], sequences[1] + 1, sequences[2]]).fingerprint() != Pieces(sequences).fingerprint()


@pytest.mark.parametrize("sequences", [[], [[], []]])
def test_nothing_to_train_on(sequences):
    with pytest.raises(InputError, match="nothing to train on"):
        Pieces(sequences)


def test_tokens_of_another_tokenizer_are_refused():
    with pytest.raises(InputError, match="Token id 9 is not in the model's vocabulary of 5"):
        Pieces([[1, 9]]).batch(np.array([0]), vocabulary_size=5)


def test_seeds_of_different_uses_differ():
    seeds = {seed_of(a, b, c) for a in range(5) for b in range(5) for c in range(5)}
    assert len(seeds) == 125
    torch.Generator().manual_seed(max(seeds))  # within what torch takes
