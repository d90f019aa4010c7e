"""What is drawn: labels, extents, colours, and texts in cells."""

import io
import subprocess
import sys
import warnings
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from matplotlib.figure import Figure
from PIL import Image

from attention_monitor import (
    AttentionMonitorError,
    animate_head,
    plot_difference,
    plot_differences,
    plot_flow,
    plot_head,
    plot_heads,
    plot_layers,
    plot_matrix,
)
from attention_monitor.naming import escaped_token
from attention_monitor.plots import fonts
from attention_monitor.plots.drawing import COLOURS

TOKENS = ["The", " cat", " sat", "\n"]


def pattern(*shape, seed=0):
    """Causal rows that sum to 1."""
    scores = np.random.default_rng(seed).normal(size=shape)
    scores = np.where(np.tri(*shape[-2:]) > 0, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def ticks(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def written(ax):
    """(column, row) -> text in the cell."""
    return {tuple(map(int, text.get_position())): text.get_text() for text in ax.texts if text.get_text()}


def maps(figure):
    """Axes of maps, without that of the colour bar."""
    return [ax for ax in figure.axes if ax.images]


def pixels(figure):
    file = io.BytesIO()
    figure.savefig(file, dpi=100)
    return np.asarray(Image.open(file))


def test_a_head_is_drawn_with_queries_downwards_keys_across_and_its_weights_in_the_cells():
    weights = pattern(4, 4)
    ax = plot_head(weights, TOKENS, title="L00H01")
    assert ax.get_title() == "L00H01"
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("key", "query")
    assert ticks(ax.yaxis) == ticks(ax.xaxis) == ["The", "·cat", "·sat", "↵"]
    assert ax.get_ylim() == (3.5, -0.5)
    assert ax.get_xlim() == (-0.5, 3.5)
    np.testing.assert_array_equal(ax.images[0].get_array(), weights)
    assert ax.images[0].get_clim() == (0, 1)
    below = {(key, query): f"{weights[query, key]:.2f}" for query in range(4) for key in range(query + 1)}
    assert written(ax) == below  # what is masked has no number


def test_each_cell_has_the_colour_of_its_weight_and_a_number_that_can_be_read():
    ax = plot_head(np.array([[1.0, 0.0], [0.25, 0.75]]), ["a", "b"])
    drawn = pixels(ax.figure)
    for query, key, weight in [(0, 0, 1), (0, 1, 0), (1, 0, 0.25), (1, 1, 0.75)]:
        x, y = ax.transData.transform((key - 0.35, query - 0.35))  # clear of the number
        expected = COLOURS(np.sqrt(weight), bytes=True)[:3]
        assert np.abs(drawn[len(drawn) - int(y), int(x), :3].astype(int) - expected).max() <= 4
    colours = {text.get_text(): text.get_color() for text in ax.texts}
    assert colours["1.00"] == "black"  # on yellow
    assert colours["0.25"] == "white"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_tensors_of_every_type_are_drawn_as_they_are(dtype):
    weights = torch.tensor([[1, 0], [0.25, 0.75]], dtype=dtype, requires_grad=True)
    np.testing.assert_array_equal(plot_head(weights).images[0].get_array(), [[1, 0], [0.25, 0.75]])


def test_cross_attention_has_labels_of_its_own_for_keys():
    ax = plot_head(np.full((2, 3), 1 / 3), ["le", " chat"], ["the", " big", " cat"])
    assert ticks(ax.yaxis) == ["le", "·chat"]
    assert ticks(ax.xaxis) == ["the", "·big", "·cat"]
    only_queries = plot_head(np.full((2, 3), 1 / 3), ["le", " chat"])
    assert ticks(only_queries.yaxis) == ["le", "·chat"]
    assert "le" not in ticks(only_queries.xaxis)


@pytest.mark.parametrize(
    ("n", "labelled", "numbers"), [(5, True, True), (12, True, True), (60, True, False), (300, False, False)]
)
def test_labels_and_numbers_are_there_while_there_is_room(n, labelled, numbers):
    ax = plot_head(pattern(n, n), [f"t{i}" for i in range(n)])
    assert (f"t{n - 1}" in ticks(ax.xaxis)) == labelled
    assert bool(ax.texts) == numbers
    assert max(pixels(ax.figure).shape) <= 1700


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (5, 5), (12, 6), (60, 60), (60, 30), (80, 7), (5, 300), (300, 300)])
@pytest.mark.parametrize("label", [None, "a", "Donaudampfer"])
@pytest.mark.parametrize("title", [None, "L00H01", "decoder.block.0.layer.1.EncDecAttention H0"])
def test_nothing_is_cut_off(shape, label, title):
    tokens = [None if label is None else [label] * n for n in shape]
    figure = plot_head(np.ones(shape) / shape[1], *tokens, title=title).figure
    figure.canvas.draw()
    boxes = [ax.get_tightbbox() for ax in figure.axes]
    width, height = figure.get_size_inches() * figure.dpi
    assert min(min(box.x0, box.y0, width - box.x1, height - box.y1) for box in boxes) >= 0


@pytest.mark.parametrize("n", [5, 60])
def test_labels_do_not_overlap(n):
    ax = plot_head(pattern(n, n), ["Donau"] * n)
    ax.figure.canvas.draw()
    boxes = [label.get_window_extent() for label in ax.yaxis.get_ticklabels()]
    assert all(a.y0 >= b.y1 - 1 for a, b in pairwise(boxes))
    boxes = [label.get_window_extent() for label in ax.xaxis.get_ticklabels()]
    assert all(a.x1 <= b.x0 + 1 for a, b in pairwise(boxes))


def test_a_scale_may_end_at_the_largest_weight():
    weights = np.array([[0.5, 0.1], [0.2, 0.3]])
    assert plot_head(weights, vmax=None).images[0].get_clim() == (0, 0.5)
    figure = plot_heads(np.stack([weights, weights / 2]), vmax=None)
    assert [ax.images[0].get_clim() for ax in maps(figure)] == [(0, 0.5), (0, 0.5)]  # one scale for all
    assert plot_head(np.zeros((2, 2)), vmax=None).images[0].get_clim() == (0, 1)


def test_it_is_drawn_where_one_wants_and_nothing_else_is_touched():
    figure = Figure()
    left, right = figure.subplots(1, 2)
    assert plot_head(pattern(3, 3), ax=left, colorbar=False) is left
    assert not right.images
    assert len(figure.axes) == 2
    plot_head(pattern(3, 3), ax=right)
    assert len(figure.axes) == 3  # with a colour bar


def test_a_difference_is_centred_at_0_and_red_where_there_is_more():
    before, after = np.array([[1.0, 0.0], [0.7, 0.3]]), np.array([[1.0, 0.0], [0.1, 0.9]])
    ax = plot_difference(before, torch.tensor(after), ["a", "b"])
    np.testing.assert_allclose(ax.images[0].get_array(), after - before)
    low, high = ax.images[0].get_clim()
    assert low == -high == pytest.approx(-0.6)
    red, _, blue, _ = ax.images[0].to_rgba(0.6)
    assert red > blue
    red, _, blue, _ = ax.images[0].to_rgba(-0.6)
    assert blue > red
    assert written(ax) == {(0, 1): "-0.60", (1, 1): "0.60"}
    assert plot_difference(before, before).images[0].get_clim() == (-1, 1)


@pytest.mark.parametrize("n_heads", [2, 12, 96])
@pytest.mark.parametrize("n", [5, 60, 300])
def test_all_heads_are_on_one_page_that_is_not_huge(n_heads, n):
    weights = pattern(n_heads, n, n)
    figure = plot_heads(weights, ["token"] * n, title="L00: all heads")
    drawn = maps(figure)
    assert [ax.get_title() for ax in drawn] == [f"H{head}" for head in range(n_heads)]
    for ax, expected in zip(drawn, weights, strict=True):
        np.testing.assert_array_equal(ax.images[0].get_array(), expected)
    boxes = [ax.get_position() for ax in drawn]
    assert all(0 <= box.x0 < box.x1 <= 1 and 0 <= box.y0 < box.y1 <= 1 for box in boxes)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert [text.get_text() for text in figure.texts] == ["L00: all heads"]
    width, height = figure.get_size_inches() * 100
    assert max(width, height) <= 4000
    each = boxes[0].width * width
    assert each >= min(n, 240)  # a pixel for each position, as far as that goes
    assert ("token" in ticks(drawn[0].xaxis)) == (n == 5 or (n == 60 and n_heads == 2))


def test_layers_are_averaged_over_heads_and_may_differ_in_shape():
    first, second = pattern(3, 4, 4), pattern(2, 4, 4, seed=1)
    drawn = maps(plot_layers([first, torch.tensor(second[0])], TOKENS, names=["a", "b"]))
    assert [ax.get_title() for ax in drawn] == ["a", "b"]
    np.testing.assert_allclose(drawn[0].images[0].get_array(), first.mean(0))
    np.testing.assert_array_equal(drawn[1].images[0].get_array(), second[0])
    assert [ax.get_title() for ax in maps(plot_layers([first, pattern(1, 7, 7)]))] == ["L00", "L01"]


def test_differences_of_all_heads_share_a_scale():
    before, after = pattern(3, 4, 4), pattern(3, 4, 4, seed=1)
    drawn = maps(plot_differences(before, after, TOKENS, title="changes"))
    largest = np.abs(after - before).max()
    assert [ax.images[0].get_clim() for ax in drawn] == [(-largest, largest)] * 3


def test_flow_has_a_line_of_means_and_a_band_over_heads():
    itself = [torch.tensor([0.1, 0.3]), torch.tensor([0.5, torch.nan])]
    ax = plot_flow({"itself": itself, "earlier tokens": [0.8, 0.5]}, ["L00", "L01"])
    lines = {line.get_label(): line.get_ydata() for line in ax.lines}
    np.testing.assert_allclose(lines["itself"], [0.2, 0.5])
    np.testing.assert_allclose(lines["earlier tokens"], [0.8, 0.5])
    band = ax.collections[0].get_paths()[0].vertices
    assert {0.1, 0.3} <= {round(y, 6) for x, y in band if x == 0}
    assert ticks(ax.xaxis) == ["L00", "L01"]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["itself", "earlier tokens"]
    low, high = ax.get_ylim()
    assert low <= 0 < 1 <= high


def test_a_matrix_has_layers_downwards_heads_across_and_values_in_its_cells():
    ax = plot_matrix([[0.5, 12.34], [torch.nan, 5328.0]], ["L00", "L07"], title="max_score", vmin=0)
    assert ticks(ax.yaxis) == ["L00", "L07"]
    assert ticks(ax.xaxis) == ["H0", "H1"]
    assert written(ax) == {(0, 0): "0.50", (1, 0): "12.3", (1, 1): "5328"}
    assert ax.images[0].get_clim() == (0, 5328)
    ragged = plot_matrix([[1.0], [1.0, 2.0, 3.0]])
    assert ticks(ragged.yaxis) == ["L00", "L01"]
    assert ragged.images[0].get_array().mask.tolist() == [[False, True, True], [False] * 3]
    assert not plot_matrix(np.ones((2, 96))).texts
    assert not plot_matrix([[np.nan]]).texts


def test_an_animation_shows_each_step_and_can_be_saved(tmp_path):
    patterns, seen = np.stack([pattern(4, 4, seed=i) for i in range(3)]), []
    animation = animate_head(patterns, [0, 50, 100], TOKENS, title="L00H01")
    animation.save(tmp_path / "head.gif", writer="pillow", progress_callback=lambda i, n: seen.append((i, n)))
    assert seen == [(0, 3), (1, 3), (2, 3)]
    with Image.open(tmp_path / "head.gif") as gif:
        assert gif.n_frames == 3
    ax = animation._fig.axes[0]
    for frame, step in enumerate([0, 50, 100]):
        animation._func(frame)
        assert ax.get_title() == f"L00H01  step {step}"
        np.testing.assert_array_equal(ax.images[0].get_array(), patterns[frame])


def test_what_arrays_and_labels_may_come_as():
    weights = pattern(2, 3, 3)
    tensors = [torch.tensor(w, requires_grad=True) for w in weights]
    for given in (list(weights), weights.tolist(), tensors, tuple(tensors)):
        drawn = maps(plot_heads(given, range(3), names=np.array(["a", "b"])))
        for ax, expected in zip(drawn, weights, strict=True):
            np.testing.assert_allclose(ax.images[0].get_array(), expected)
        assert ticks(drawn[0].xaxis) == ["0", "1", "2"]
        assert [ax.get_title() for ax in drawn] == ["a", "b"]
    assert maps(plot_heads([torch.eye(2, dtype=torch.bfloat16)] * 2))
    masked = np.ma.masked_array(weights[0], weights[0] == 0)
    np.testing.assert_array_equal(plot_head(masked).images[0].get_array().mask, weights[0] == 0)
    assert ticks(plot_matrix([[1.0, 2.0]], [7]).yaxis) == ["7"]
    assert ticks(plot_flow({"a": [0.1, 0.2]}, [3, 4]).xaxis) == ["3", "4"]

    class Table:  # as of pandas: iterating gives the names of columns
        def __iter__(self):
            return iter("ab")

        def to_numpy(self):
            return np.array([[1.0, 2.0]])

    assert written(plot_matrix(Table())) == {(0, 0): "1.00", (1, 0): "2.00"}


def test_small_numbers_are_not_written_as_0():
    assert set(written(plot_matrix([[1e-8, 0.0, -0.002]])).values()) == {"1e-8", "0.00", "-2e-3"}


def test_long_names_stay_within_their_place():
    names = [f"decoder.block.{i}.layer.1.EncDecAttention" for i in range(4)]
    figure = plot_heads(pattern(4, 5, 5), names=names)
    figure.canvas.draw()
    boxes = [ax.title.get_window_extent() for ax in maps(figure)]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(ax.get_title().endswith("EncDecAttention") for ax in maps(figure))
    ax = plot_matrix(np.ones((2, 2)), title="attention entropy of the heads, in nats, step 1000")
    ax.figure.canvas.draw()
    box = ax.title.get_window_extent()
    assert 0 <= box.x0 < box.x1 <= ax.figure.bbox.width


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plot_head(np.ones((2, 3, 3))), r"pattern must be numbers of shape \(Q, K\), got float64 of shape \(2"),
        (lambda: plot_heads(np.ones((3, 3))), r"patterns must be numbers of shape \(H, Q, K\).*add the axes"),
        (lambda: plot_head(np.array([["a"]])), "pattern must be numbers"),
        (lambda: plot_head(np.ones((3, 3)), ["a", "b"]), "tokens must be a list.* each of 3 queries.*; give 3"),
        (lambda: plot_head(np.ones((3, 3)), "abc"), "tokens must be a list"),
        (lambda: plot_head(np.ones((2, 3)), ["a", "b"], ["c"]), "key_tokens must be a list with a label for each of 3"),
        (lambda: plot_head(np.ones((0, 3))), "There is nothing to draw.*; give one with a query"),
        (lambda: plot_heads(np.ones((0, 3, 3))), "There is nothing to draw"),
        (lambda: plot_heads(np.ones((2, 3, 3)), names=["a"]), "names must be a list with a label for each of 2 maps"),
        (lambda: plot_difference(np.ones((2, 2)), np.ones((3, 3))), r"Maps of one shape.*got \(2, 2\) before.*; have"),
        (lambda: plot_heads([np.ones((3, 3)), np.ones((2, 2))]), "patterns must be.*got parts of different shapes"),
        (lambda: plot_head([[1, 2], [3]]), "pattern must be numbers.*got parts of different shapes; pad them"),
        (lambda: plot_head(np.ones((2, 2)), vmax=-1), "vmax must be more than 0, got -1; give None"),
        (lambda: plot_matrix([[1.0]], vmin=1, vmax=0), "vmin must not be more than vmax, got 1 and 0; swap"),
        (lambda: plot_layers([np.ones(3)]), r"a layer's pattern must be numbers of shape \(H, Q, K\) or \(Q, K\)"),
        (lambda: plot_flow({}), "flow must have the same layers"),
        (lambda: plot_flow({"a": [1], "b": [1, 2]}), r"got {'a': 1, 'b': 2}; give every line a share"),
        (lambda: plot_matrix([]), "values must have a layer with a head.*; give a row"),
        (lambda: animate_head(np.ones((2, 3, 3)), [1]), "a step for each of one or more maps, got 1, 2.*; give as"),
    ],
)  # fmt: skip
def test_what_cannot_be_drawn_is_refused(draw, message):
    with pytest.raises(AttentionMonitorError, match=message):
        draw()


def test_hostile_tokens_and_numbers_are_drawn_without_a_warning():
    strange = ["$\\frac", "\x1b[31m", "日本\u202e", "🙂", "שלום", "x" * 1000, "", "\\n_^{"]
    weights = pattern(8, 8)
    weights[3] = np.nan
    weights[4, 0] = np.inf
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels(plot_head(weights, strange, title="$\\bad").figure)
        pixels(plot_heads(np.stack([weights, weights]), strange, title="$\\bad", names=["$", "_"]))
        pixels(plot_difference(weights, weights, strange).figure)
        pixels(plot_matrix([[np.nan, np.inf]], ["$x"]).figure)


@pytest.mark.parametrize(
    ("token", "label"),
    [(" the", "·the"), ("\t\r\n", "→↵↵"), ("\x1b[31m", "�[31m"), ("x" * 13, "x" * 11 + "…"), ("x" * 12, "x" * 12),
     ("日" * 7, "日" * 5 + "…"), ("日" * 6, "日" * 6), ("a\u202eb", "a�b"), ("e\u0301", "e\u0301"), ("", "")],
)  # fmt: skip
def test_tokens_are_made_visible_in_at_most_twelve_columns(token, label):
    assert escaped_token(token) == label


def test_characters_that_matplotlib_lacks_are_drawn_in_a_font_that_has_them(tmp_path, monkeypatch):
    assert fonts.short_token("日") == "▯" or fonts.font_families("日") != ["DejaVu Sans"]  # where one is installed
    builder = FontBuilder(1000, isTTF=True)
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0)), pen.lineTo((900, 0)), pen.lineTo((900, 900)), pen.closePath()
    builder.setupGlyphOrder([".notdef", "one"])
    builder.setupCharacterMap({0x13000: "one"})  # a hieroglyph
    builder.setupGlyf({".notdef": pen.glyph(), "one": pen.glyph()})
    builder.setupHorizontalMetrics({".notdef": (1000, 0), "one": (1000, 0)})
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": "Hieroglyphs", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(tmp_path / "hieroglyphs.ttf")
    assert fonts.missing_glyphs(["a\U00013000", "\U00013000"]) == "\U00013000"
    assert fonts.short_token("\U00013000") == "▯"
    monkeypatch.setattr(font_manager.fontManager, "ttflist", list(font_manager.fontManager.ttflist))
    font_manager.fontManager.addfont(tmp_path / "hieroglyphs.ttf")
    fonts._font_of.cache_clear()
    try:
        assert fonts.missing_glyphs(["a\U00013000"]) == ""
        ax = plot_head(np.ones((1, 1)), ["a\U00013000"])
        assert ticks(ax.xaxis) == ["a\U00013000"]
        assert ax.get_xticklabels()[0].get_fontfamily() == ["DejaVu Sans", "Hieroglyphs"]
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # matplotlib warns of a glyph that is missing
            pixels(ax.figure)
    finally:
        fonts._font_of.cache_clear()


@pytest.mark.parametrize("module", sorted(path.stem for path in Path(fonts.__file__).parent.glob("[!_]*.py")))
def test_every_module_of_plots_is_there_without_torch(module):
    code = f"import sys; sys.modules['torch'] = None; import attention_monitor.plots.{module}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_drawing_does_not_load_pyplot_nor_torch():
    code = (
        "import sys, numpy as np; from attention_monitor import plot_head, plot_heads, animate_head\n"
        "plot_head(np.ones((1, 1))); plot_heads(np.ones((1, 1, 1)))\n"
        "assert not {'matplotlib.pyplot', 'torch'} & set(sys.modules), 'loaded'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
