"""Spans that go with sequences: counted by hand, cut with their pieces, stored, and given to a batch."""

from __future__ import annotations

import numpy as np
import pytest
from processive import bio
from processive.errors import ConfigError, InputError
from processive.sequences import (
    PackedBatch,
    Spanned,
    TokenStore,
    cut_spans,
    has_spans,
    spans_in,
    token_lengths,
    token_spans,
    tokenize_files,
)
from processive.sequences.store import StoreWriter
from processive.training.data import Mixture, Pieces


def test_spans_of_letters_become_spans_of_tokens():
    tokenizer = bio.KmerTokenizer(k=3)
    lengths = token_lengths(tokenizer.vocabulary)
    ids = tokenizer.encode("ACGTTANACGG")  # <s> ACG TTA N A C G G </s>: the window with N in single bases
    assert tokenizer.vocabulary.decode(ids) == ["<s>", "ACG", "TTA", "N", "A", "C", "G", "G", "</s>"]
    spans = [(0, 1), (2, 4), (3, 6), (6, 7), (0, 11), (10, 11)]
    assert token_spans(spans, ids, lengths) == [(1, 2), (1, 3), (2, 3), (3, 4), (1, 8), (7, 8)]
    single = bio.DNATokenizer()
    assert token_spans([(0, 4), (2, 3)], single.encode("ACGT"), token_lengths(single.vocabulary)) == [(1, 5), (3, 4)]
    assert token_spans([], ids, lengths) == []


@pytest.mark.parametrize("span", [(3, 3), (-1, 2), (2, 12)])
def test_a_span_outside_is_refused(span):
    tokenizer = bio.KmerTokenizer(k=3)
    with pytest.raises(InputError, match="Here has a length of 11 and no span"):
        token_spans([span], tokenizer.encode("ACGTTANACGG"), token_lengths(tokenizer.vocabulary), what="Here")
    with pytest.raises(InputError, match="Sequence 2 has a length of 2 and no span"):
        Spanned([[1], [1, 2]], [[], [(span[0], span[1])]])


def test_spans_are_cut_with_their_pieces():
    assert cut_spans([(0, 3), (2, 9), (5, 6), (4, 5)], 3, 3) == [(0, 3), (2, 3), (1, 2)]
    sequences = Spanned([np.arange(7), np.array([], int), np.arange(3)], [[(1, 6), (6, 7)], [], [(0, 3)]])
    pieces = Pieces(sequences, max_length=3)
    assert pieces.lengths.tolist() == [3, 3, 1, 3]
    assert [pieces.spans_of(i) for i in range(4)] == [[(1, 3)], [(0, 3)], [(0, 1)], [(0, 3)]]
    batch = pieces.batch([2, 0], vocabulary_size=9)
    assert batch.tokens.tolist() == [6, 0, 1, 2]
    assert spans_in(batch) == (((0, 1),), ((1, 3),))


def test_a_mixture_has_spans_where_all_have_some():
    spanned = Spanned([[1, 2, 3]], [[(1, 2)]])
    both = Pieces(Mixture((spanned, Spanned([[4, 5]], [[(0, 1)]])), (1, 1)))
    assert both.has_spans and [both.spans_of(i) for i in (0, 1)] == [[(1, 2)], [(0, 1)]]
    assert not Pieces(Mixture((spanned, [[4, 5]]), (1, 1))).has_spans
    with pytest.raises(ConfigError, match="needs sequences with spans"):
        spans_in(PackedBatch.from_sequences([[1, 2]]))


def test_the_fingerprint_tells_other_spans():
    marks = {Pieces(Spanned([[1, 2, 3]], [spans])).fingerprint() for spans in ([(1, 2)], [(1, 3)], [])}
    assert len(marks) == 3


def test_a_store_keeps_the_spans(tmp_path, rng):
    sequences = [rng.integers(0, 50, n) for n in (5, 0, 9)]
    spans = [[(0, 2), (1, 5)], [], [(8, 9)]]
    store = TokenStore.write(tmp_path / "store", iter(sequences), vocabulary_size=50, spans=iter(spans))
    again = TokenStore(store.path)
    assert has_spans(again) and [again.spans_of(i) for i in range(3)] == spans
    assert again.spans_of(-1) == [(8, 9)] and [a.tolist() for a in again] == [a.tolist() for a in sequences]
    with pytest.raises(IndexError):
        again.spans_of(3)
    none = TokenStore.write(tmp_path / "none", [[1]], vocabulary_size=2, spans=[[]])
    assert has_spans(none) and none.spans_of(0) == []
    without = TokenStore.write(tmp_path / "without", [[1]], vocabulary_size=2)
    assert not has_spans(without)
    with pytest.raises(ConfigError, match="holds no spans"):
        without.spans_of(0)
    with pytest.raises(ValueError):
        TokenStore.write(tmp_path / "few", [[1], [0]], vocabulary_size=2, spans=[[]])


def test_sequences_with_and_without_spans_do_not_mix_in_a_store(tmp_path):
    with StoreWriter(tmp_path, 9) as writer:
        writer.append(np.array([1, 2]), [2], [[(0, 1)]])
        writer.append(np.zeros(0, int), [])  # a chunk in which nothing could be used
        with pytest.raises(ConfigError, match="some without"):
            writer.append(np.array([1, 2]), [2])


def test_a_store_goes_on_behind_its_spans(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    added = [(np.array([1, 2]), [2], [[(0, 1), (0, 2)]]), (np.array([3]), [1], [[(0, 1)]])]
    with StoreWriter(whole, 9) as writer:
        for one in added:
            writer.append(*one)
        writer.finish({})
    with StoreWriter(parts, 9) as writer:
        writer.append(*added[0])
        at = {"sequences": writer.sequences, "tokens": writer.tokens, "spans": writer.spans}
        writer.append(np.array([7, 7]), [2], [[(0, 1)]])  # was not noted before the run was killed
    with StoreWriter(parts, 9, **at) as writer:
        writer.append(*added[1])
        writer.finish({})
    assert {f.name: f.read_bytes() for f in whole.iterdir()} == {f.name: f.read_bytes() for f in parts.iterdir()}
    assert [TokenStore(parts).spans_of(i) for i in (0, 1)] == [[(0, 1), (0, 2)], [(0, 1)]]


@pytest.mark.parametrize("workers", [1, 2])
def test_tokenized_files_have_the_spans_of_their_records(tmp_path, workers):
    (tmp_path / "a.fasta").write_text(">P1 first\nMKTAY\n>P2\nMJ\n>P3\nGSHM\n")
    tokenizer = bio.ProteinTokenizer()
    table = {"P1": [(1, 3)], "P3": [(0, 4), (2, 3)]}
    store = tokenize_files(
        {"a": lambda: bio.chunks(tmp_path / "a.fasta", tokenizer, spans=table)},
        tokenizer,
        tmp_path / f"store{workers}",
        workers=workers,
        on_error="skip",
    )
    assert [store.spans_of(i) for i in range(len(store))] == [[(2, 4)], [(1, 5), (3, 4)]]
    records = bio.read(tmp_path / "a.fasta", tokenizer)
    known = bio.tokenize(records, tokenizer, spans=table)
    assert [known.spans_of(i) for i in range(2)] == [store.spans_of(i) for i in range(2)]
    assert [ids.tolist() for ids in known] == [ids.tolist() for ids in store]
