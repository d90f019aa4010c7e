import io
import subprocess
import sys
import warnings

import numpy as np
import pytest
from PIL import Image

from attention_monitor import AttentionMonitorError, plot_head
from attention_monitor.plots.drawing import COLOURS, short_number
from attention_monitor.plots.fonts import short_token
from attention_monitor.plots.repainted import HeadMatrix, Mosaic, RepaintedMap

WHITE = (255, 255, 255)


def colour(value):
    """Of a weight: square-root scale from 0 to 1."""
    return COLOURS(np.sqrt(value), bytes=True)[:3]


def cell(mosaic, pixels, layer, head, query, key):
    """The pixel in the middle of a cell."""
    row, column = layer * mosaic._row + query, head * mosaic._column + key
    y, x = mosaic.top + (row + 0.5) * mosaic.cell[0], mosaic.left + (column + 0.5) * mosaic.cell[1]
    return tuple(pixels[int(y), int(x)])


@pytest.mark.parametrize("tokens", [None, [" the", "\n", "$x$", "日本"]])
def test_each_cell_of_the_mosaic_has_the_colour_of_its_weight(tokens):
    rng = np.random.default_rng(0)
    patterns = [rng.random((3, 4, 4)).astype(np.float32) for _ in range(2)]
    mosaic = Mosaic([(3, 4, 4)] * 2, ["L00", "L01"], tokens, "maps")
    for _ in range(2):  # the second drawing reuses the first one's labels
        pixels = mosaic.draw(patterns)
        assert pixels.dtype == np.uint8
        for layer, head, query, key in np.ndindex(2, 3, 4, 4):
            found = np.array(cell(mosaic, pixels, layer, head, query, key), dtype=int)
            # to within one step of the 256-colour scale
            assert np.abs(found - colour(patterns[layer][head, query, key])).max() <= 3
        patterns = [1 - pattern for pattern in patterns]


def test_layers_may_differ_in_heads_and_lengths():
    mosaic = Mosaic([(1, 3, 3), (2, 2, 4)], ["a", "b"], None, "maps")
    pixels = mosaic.draw([np.ones((1, 3, 3)), np.ones((2, 2, 4))])
    assert cell(mosaic, pixels, 0, 0, 2, 2) == tuple(colour(1.0))
    assert cell(mosaic, pixels, 0, 1, 0, 0) == WHITE
    assert cell(mosaic, pixels, 1, 1, 1, 3) == tuple(colour(1.0))
    assert cell(mosaic, pixels, 1, 1, 2, 0) == WHITE


def texts(figure):
    axes = figure.axes[0]
    return [t.get_text() for t in [*figure.texts, *axes.get_xticklabels(), *axes.get_yticklabels()]]


def test_tokens_layers_heads_and_title_are_written():
    mosaic = Mosaic([(2, 3, 3)] * 2, ["L00", "L01"], ["The", " cat", "\n"], "what $it$ is")
    mosaic.draw([np.ones((2, 3, 3))] * 2)
    written = texts(mosaic.figure)
    assert {"what $it$ is", "L00", "L01", "H0", "H1", "The", "·cat", "↵"} <= set(written)
    assert written.count("·cat") == 4  # along the side of each layer, below each head


def test_many_positions_are_not_labelled():
    mosaic = Mosaic([(1, 50, 50)], ["L00"], ["x"] * 50, "maps")
    assert "x" not in texts(mosaic.figure)


@pytest.mark.parametrize(
    ("n_heads", "layers", "size"), [(1, 1, 1), (2, 1, 5), (12, 12, 60), (12, 12, 96), (32, 3, 20), (1, 96, 8)]
)
def test_pictures_of_all_sizes_can_be_drawn_and_are_not_huge(n_heads, layers, size):
    labels = [f"L{layer:02d}" for layer in range(layers)]
    pixels = Mosaic([(n_heads, size, size)] * layers, labels, ["x"] * size, "maps").draw(
        [np.ones((n_heads, size, size))] * layers
    )
    assert max(pixels.shape) < 5000
    pixels = HeadMatrix([n_heads] * layers, labels, "entropy").draw([np.ones(n_heads)] * layers)
    assert max(pixels.shape) < 5000


def test_cells_of_the_matrix_have_the_colour_of_their_value_and_nan_is_white():
    matrix = HeadMatrix([2, 3], ["L00", "L01"], "entropy", "0..1")
    pixels = matrix.draw([np.array([0.0, np.nan]), np.array([1.0, 0.25, 0.5])])
    expected = [[0.0, np.nan, np.nan], [1.0, 0.25, 0.5]]
    for (layer, head), value in np.ndenumerate(expected):
        corner = pixels[matrix.top + layer * 28 + 2, matrix.left + head * 42 + 2]  # clear of the number
        assert tuple(corner) == (WHITE if np.isnan(value) else tuple(COLOURS(value, bytes=True)[:3]))


def test_values_are_written_into_the_matrix():
    matrix = HeadMatrix([1], ["L00"], "x", "0..1")
    blank, other = matrix.draw([np.array([0.0])]), matrix.draw([np.array([0.001])])
    inside = blank[matrix.top : matrix.top + 28, matrix.left : matrix.left + 42]
    assert (inside > 200).all(-1).any()  # white digits on the dark cell
    assert not (other == blank).all()


@pytest.mark.parametrize("values", [[np.nan, np.nan], [np.inf, 1.0], [3.0, 3.0], [-1e30, 1e30]])
def test_strange_values_can_be_drawn(values):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        HeadMatrix([2], ["L00"], "x").draw([np.array(values)])


@pytest.mark.parametrize(("value_range", "value"), [("1..n_i", 0.9999999), ("1..n_i", np.nan), ("n..0", 0.5)])
def test_values_beyond_the_one_bound_that_is_known_can_be_drawn(value_range, value):
    matrix = HeadMatrix([1], ["L00"], "x", value_range)
    corner = matrix.draw([np.array([value])])[matrix.top + 2, matrix.left + 2]
    assert tuple(corner) == (WHITE if np.isnan(value) else tuple(COLOURS(0.0, bytes=True)[:3]))


@pytest.mark.parametrize("tokens", [None, [" the", "\n", "$x$", "日本"] * 5])
def test_a_map_that_is_repainted_is_the_one_of_plot_head(tokens):
    rng = np.random.default_rng(0)
    painter = RepaintedMap((20, 20), tokens, title="L03H00")
    for head in range(3):  # each is painted over the one before
        weights, file = rng.random((20, 20)), io.BytesIO()
        plot_head(weights, tokens, title=f"L03H{head:02d}").figure.savefig(file, dpi=100)
        expected = np.asarray(Image.open(file).convert("RGB")).astype(int)
        found = painter.draw(weights, f"L03H{head:02d}")
        assert found.shape == expected.shape
        assert (np.abs(found - expected) > 8).mean() < 0.002  # the edges of the frame


def test_a_map_of_another_shape_is_refused():
    with pytest.raises(AttentionMonitorError, match=r"maps of shape \(20, 20\), got \(3, 3\); make another"):
        RepaintedMap((20, 20), title="L03H00").draw(np.ones((3, 3)), "L03H00")


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0.5, "0.50"),
        (-3.14159, "-3.14"),
        (12.34, "12.3"),
        (5328, "5328"),
        (-1670.2, "-1670"),
        (3.1e5, "3e5"),
        (np.nan, "nan"),
        (0.001, "1e-3"),
        (-2e-8, "-2e-8"),
        (0.0, "0.00"),
    ],
)
def test_numbers_fit_into_a_cell(number, text):
    assert short_number(number) == text
    assert len(text) <= 6


def test_hostile_tokens_become_harmless_labels():
    assert short_token("\x1b[31m") == "�[31m"
    assert short_token("$\\frac1$") == "$\\frac1$"  # not taken for a formula
    assert len(short_token("x" * 1000)) == 12
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Mosaic([(1, 3, 3)], ["L00"], ["$\\frac", "日本\u202e", "🙂"], "$\\bad").draw([np.ones((1, 3, 3))])


def test_drawing_does_not_load_pyplot():
    code = (
        "import sys, numpy as np; from attention_monitor.plots.repainted import HeadMatrix\n"
        "HeadMatrix([1], ['L00'], 'x').draw([np.ones(1)]); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
