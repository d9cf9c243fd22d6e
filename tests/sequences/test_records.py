from pathlib import Path

import pytest
from processive.errors import InputError
from processive.sequences import Record, Records

BAD = Record("C?", "two", 2, InputError("'?' is no atom.", position=2))
RECORDS = Records((Record("CC", "one", 1), BAD, Record("CO", "three", 3)), Path("m.smi"))


def test_unusable_records_stay_in_their_place():
    assert len(RECORDS) == 3
    assert RECORDS[1] is BAD
    assert [record.name for record in RECORDS.usable] == ["one", "three"]
    assert RECORDS.rejected == [BAD]


def test_raise_names_file_record_position_and_what_to_do():
    with pytest.raises(InputError) as caught:
        RECORDS.checked("raise")
    assert str(caught.value).startswith(
        "m.smi, record 2 (two), position 2: '?' is no atom. Mend it, or pass --on-error"
    )


def test_skip_warns_with_the_count():
    with pytest.warns(UserWarning, match=r"m.smi: 1 of 3 records cannot be used \(records 2\)"):
        assert RECORDS.checked("skip") is RECORDS


def test_nothing_usable_is_an_error_whatever_the_policy():
    with pytest.raises(InputError, match="no usable record"):
        Records((BAD,)).checked("skip")
