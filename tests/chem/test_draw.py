import sys

import numpy as np
import pytest
from processive.chem.draw import draw_map, draw_molecules, draw_properties, principal_components
from processive.chem.metrics import property_table
from processive.errors import ConfigError, InputError, OutputError

pytest.importorskip("rdkit")
pytest.importorskip("matplotlib")

PNG = b"\x89PNG"


def table(smiles):
    """Two properties, one counted and one measured."""
    return {name: values for name, values in property_table(smiles).items() if name in ("logP", "rings")}


def size(path):
    """Width and height that a PNG states."""
    return tuple(int.from_bytes(path.read_bytes()[i : i + 4], "big") for i in (16, 20))


def test_molecules_as_png(tmp_path):
    path = draw_molecules(tmp_path / "new" / "a.png", ["CCO", "c1ccccc1", "C1CC", "CC"], columns=3, cell=(100, 80))
    assert path == tmp_path / "new" / "a.png"
    assert path.read_bytes().startswith(PNG)
    assert size(path) == (300, 160)


def test_molecules_as_svg_keep_the_cell_of_one_that_is_none(tmp_path):
    path = draw_molecules(tmp_path / "a.svg", ["CCO", "C1CC"], legends=["ethanol", "broken"], cell=(100, 80))
    text = path.read_text()
    assert "<svg" in text and "width='200px'" in text
    alone = draw_molecules(tmp_path / "b.svg", ["CCO"], legends=["ethanol"], cell=(100, 80)).read_text()
    assert len(text) > len(alone) + 1000  # the label of the empty cell is drawn


def test_properties(tmp_path):
    tables = {"generated": table(["CCO", "C1CC", "CCN"]), "training": table(["c1ccccc1", "CCCC"])}
    for suffix, magic in (("png", PNG), ("svg", b"<?xml"), ("pdf", b"%PDF")):
        path = draw_properties(tmp_path / f"p.{suffix}", tables)
        assert path.read_bytes().startswith(magic)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.pdf", "p.png", "p.svg"]


def test_properties_of_nothing_valid_still_draw(tmp_path):
    assert draw_properties(tmp_path / "p.png", {"generated": table(["C1CC"])}).is_file()


def test_pictures_leave_pyplot_alone(tmp_path):
    before = sys.modules.pop("matplotlib.pyplot", None)
    try:
        draw_properties(tmp_path / "p.png", {"generated": table(["CCO", "CCN"])})
        assert "matplotlib.pyplot" not in sys.modules
    finally:
        if before is not None:
            sys.modules["matplotlib.pyplot"] = before


def test_map_leaves_rows_with_nan_out(tmp_path, rng):
    embeddings = rng.normal(size=(30, 5)).astype(np.float32)
    embeddings[3] = np.nan
    values = rng.normal(size=30)
    values[4] = np.nan
    path = draw_map(tmp_path / "m.svg", embeddings, values, label="logP", title="molecules")
    assert path.read_bytes().startswith(b"<?xml")
    assert path.read_text().count("<use ") >= 28


def test_principal_components_are_those_of_the_singular_values(rng):
    embeddings = rng.normal(size=(50, 6)) * [9, 5, 1, 1, 1, 1] + 100
    points, share = principal_components(embeddings)
    centred = embeddings - embeddings.mean(0)
    values = np.linalg.svd(centred, compute_uv=False)
    assert np.allclose(np.linalg.norm(points, axis=0), values[:2])
    assert np.allclose(share, values[:2] ** 2 / (values**2).sum())
    assert abs(points[:, 0] @ points[:, 1]) < 1e-6
    assert np.allclose(principal_components(-embeddings)[0], -points)  # the sign is settled by the loadings


@pytest.mark.parametrize(
    ("draw", "error", "reason"),
    [
        (lambda f: draw_molecules(f / "a.jpeg", ["CCO"]), ConfigError, "ends on none of .png, .svg"),
        (lambda f: draw_molecules(f / "a.png", ["CCO"], legends=["a", "b"]), ConfigError, "2 legends for 1"),
        (lambda f: draw_molecules(f / "a.png", ["C1CC"]), InputError, "no molecule to draw"),
        (lambda f: draw_molecules(f / "a.png", []), InputError, "no molecule to draw"),
        (lambda f: draw_properties(f / "a", {}), ConfigError, "ends on none"),
        (lambda f: draw_properties(f / "a.png", {}), InputError, "no property"),
        (lambda f: draw_map(f / "a.png", np.zeros((3, 4)), np.zeros(2)), ConfigError, "do not belong together"),
        (lambda f: draw_map(f / "a.png", np.full((3, 4), np.nan), np.zeros(3)), InputError, "at least two molecules"),
    ],
)
def test_what_cannot_be_drawn_is_an_error_and_leaves_no_file(tmp_path, draw, error, reason):
    with pytest.raises(error, match=reason):
        draw(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_an_output_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        draw_molecules(tmp_path / "file" / "a.png", ["CCO"])
