"""Token ids as a tokenizer: they come back, or are refused with a position."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from processive.errors import ConfigError, InputError
from processive.sequences import IdTokenizer

TOKENIZER = IdTokenizer(40)


@given(st.lists(st.integers(0, 39), max_size=30))
def test_ids_round_trip(ids):
    for record in (ids, np.array(ids, np.int64), " ".join(map(str, ids))):
        assert TOKENIZER.encode(record).tolist() == ids
    assert TOKENIZER.encode(TOKENIZER.decode(ids)).tolist() == ids
    assert IdTokenizer.from_dict(TOKENIZER.to_dict()).decode(ids) == TOKENIZER.decode(ids)


@given(st.text(max_size=20))
def test_any_text_comes_back_or_is_refused_by_position(text):
    words = text.split()
    good = [word.isdecimal() and int(word) < 40 for word in words]
    if all(good):
        assert TOKENIZER.encode(text).tolist() == [int(word) for word in words]
    else:
        with pytest.raises(InputError) as raised:
            TOKENIZER.encode(text)
        assert raised.value.position == good.index(False) + 1


@pytest.mark.parametrize("record", [[3, 40], [3, -1], "3 x"], ids=str)
def test_what_is_no_id(record):
    with pytest.raises(InputError, match="is no token id from 0 to 39"):
        TOKENIZER.encode(record)


@pytest.mark.parametrize("size", [0, -3, True], ids=repr)
def test_sizes_that_are_none(size):
    with pytest.raises(ConfigError, match="size is a number of tokens"):
        IdTokenizer(size)
