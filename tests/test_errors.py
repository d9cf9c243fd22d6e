import pytest
from processive.errors import InputError, MissingExtra, ShapeError, needs


def test_input_error_says_where_and_what_to_do():
    error = InputError("'J' is not an amino acid.", position=83, hint="Replace it with X.")
    placed = error.at(path="proteins.fasta", record=17, name="sp|P0A7Y4")
    assert str(placed) == (
        "proteins.fasta, record 17 (sp|P0A7Y4), position 83: 'J' is not an amino acid. Replace it with X."
    )
    assert str(InputError("Nothing there.")) == "Nothing there."
    assert str(InputError("Bad.", name="x")) == "x: Bad."


def test_shape_error_names_the_tensor():
    assert "cu_seqlens: got shape (3,), expected (4,)" in str(ShapeError("cu_seqlens", (3,), (4,)))


def test_missing_extra_names_the_extra():
    with pytest.raises(MissingExtra, match=r"no_such_package.*pip install 'processive\[chem\]'"), needs("chem"):
        import no_such_package  # noqa: F401


def test_a_broken_room_is_not_a_missing_extra():
    with pytest.raises(ModuleNotFoundError, match="no_such_room"), needs("chem"):
        import processive.no_such_room  # noqa: F401
