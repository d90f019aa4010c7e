"""Arrays -> pixels, for pictures that are drawn many times.

Axes, ticks and labels are drawn once, by matplotlib; what changes is painted over that each time. To draw all of it
anew takes ten times as long.

While a model trains, cells of a ``RepaintedGrid`` have a whole number of pixels, so that they are painted without
matplotlib: ``Mosaic`` has all maps, ``HeadMatrix`` one number of every head. ``RepaintedMap`` is a figure of
``plot_head`` for one head after the other.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont

from ..errors import AttentionMonitorError
from ..naming import head_heading
from .arrays import as_array, as_matrix
from .drawing import (
    COLOURS,
    add_colorbar,
    bounds_of,
    label_matrix,
    number_colours,
    short_number,
    text_style,
    value_norm,
    weight_norm,
)
from .figures import plot_head
from .fonts import short_token, with_known_glyphs
from .maps import MAX_WRITTEN

DPI = 100
LABEL_PIXELS = 8  # height of a token's label, 5.5 points
MAX_TOKEN_LABELS = 40  # positions of a map with a label each: half as many as in a figure, as maps stand side by side
MAP_PIXELS = 120  # side that a map of few positions grows to: enough to see a single weight
MAX_PIXELS = 3000  # side that a mosaic grows to: more is scaled down by a browser; many positions take one pixel each
CHARACTER_PIXELS = 7  # width of a character of a layer's label, 8 points


def _drawn(figure: Figure) -> FigureCanvasAgg:
    """Draw a figure, but for what is animated in it."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return canvas


def _pixels(canvas: FigureCanvasAgg) -> np.ndarray:
    """Copy the pixels of a canvas, (height, width, 3) uint8."""
    return np.array(canvas.buffer_rgba())[..., :3]


class RepaintedGrid:
    """A grid of coloured cells in a figure of which all but the cells is drawn once.

    Args:
        grid: number of rows and of columns.
        cell: height and width of a cell in pixels.
        margins: room at the left, right, top and bottom in pixels.
        title: title above the grid.
    """

    def __init__(
        self, grid: tuple[int, int], cell: tuple[int, int], margins: tuple[int, int, int, int], title: str
    ) -> None:
        self.cell = cell
        self.left, right, self.top, bottom = margins
        height, width = grid[0] * cell[0], grid[1] * cell[1]
        self._total = (width + self.left + right, height + self.top + bottom)
        self.figure = Figure(figsize=(self._total[0] / DPI, self._total[1] / DPI), dpi=DPI)
        self.axes = self.add_axes(self.left, self.top, width, height)
        self.axes.set(xlim=(-0.5, grid[1] - 0.5), ylim=(grid[0] - 0.5, -0.5))
        self.axes.tick_params(length=0, pad=2)
        self.axes.spines[:].set_visible(False)
        self.write(title, 6, 14, 9)
        self._rest: np.ndarray | None = None

    def add_axes(self, left: int, top: int, width: int, height: int) -> Axes:
        """Add Axes at a place in pixels from the top left."""
        W, H = self._total
        return self.figure.add_axes((left / W, (H - top - height) / H, width / W, height / H))

    def write(self, text: str, x: float, y: float, fontsize: float, ha: str = "left") -> None:
        """Write a text, the middle of its height at a place in pixels from the top left."""
        W, H = self._total
        self.figure.text(
            x / W, 1 - y / H, with_known_glyphs(text), fontsize=fontsize, ha=ha, va="center", **text_style(text)
        )

    def paint(self, values: np.ndarray, norm: Normalize) -> np.ndarray:
        """Paint the cells.

        Args:
            values: (rows, columns) values; NaN is white.
            norm: scale of the values.

        Returns:
            Pixels (height, width, 3), uint8.
        """
        if self._rest is None:
            self._rest = _pixels(_drawn(self.figure))
        colours = COLOURS(norm(np.ma.masked_invalid(values)), bytes=True)[..., :3]
        cells = colours.repeat(self.cell[0], axis=0).repeat(self.cell[1], axis=1)
        pixels = self._rest.copy()
        pixels[self.top : self.top + cells.shape[0], self.left : self.left + cells.shape[1]] = cells
        return pixels


class Mosaic(RepaintedGrid):
    """All maps of a model in one Axes: layers from top to bottom, heads from left to right.

    Within a map, queries go from top to bottom, keys from left to right. Colour is the weight, 0..1, on a square-root
    scale so that diffuse rows can be told apart. Where maps differ in size, the smaller ones are stretched.

    Args:
        shapes: (H, Q, K) of each layer.
        labels: label of each layer.
        tokens: labels of the positions; None: positions are not labelled.
        title: title above the maps.
        are_heads: whether columns are heads, which then have a heading each.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, ...]],
        labels: Sequence[str],
        tokens: Sequence[str] | None,
        title: str,
        are_heads: bool = True,
    ) -> None:
        self._are_heads = are_heads
        n_heads, Q, K = (max(shape[axis] for shape in shapes) for axis in range(3))
        self._largest = Q, K
        gap = max(1, round(max(Q, K) / 16))  # positions between maps: seen, and small beside a map
        self._row, self._column = Q + gap, K + gap
        self.grid = (self._row * len(shapes) - gap, self._column * n_heads - gap)
        labelled = tokens is not None and max(Q, K) <= MAX_TOKEN_LABELS
        cell = max(LABEL_PIXELS if labelled else 1, MAP_PIXELS // max(Q, K))
        cell = max(1, min(cell, MAX_PIXELS // max(self.grid)))
        left = 8 + CHARACTER_PIXELS * max(map(len, labels))
        # a label of tokens has at most 12 columns of 5.5 points: 70 pixels, and below the maps 80 with some air
        left, bottom = (left + 70, 80) if labelled else (left + 6, 12)
        top, right = 40, 70  # for title and headings; for the colour bar with its numbers
        super().__init__(self.grid, (cell, cell), (left, right, top, bottom), title)
        self.norm = weight_norm((), 1)
        self._label(labels, n_heads, (Q, K), [short_token(token) for token in tokens or ()] if labelled else [])
        bar = self.add_axes(left + self.grid[1] * cell + 12, top, 10, min(self.grid[0] * cell, 200))
        add_colorbar(self.figure, self.norm, COLOURS, cax=bar)

    def _label(self, labels: Sequence[str], n_heads: int, size: tuple[int, int], tokens: list[str]) -> None:
        Q, K = size
        rows = [layer * self._row for layer in range(len(labels))]
        columns = [head * self._column for head in range(n_heads)]
        style: dict[str, Any] = {"fontsize": 5.5, **text_style(tokens)}
        self.axes.set_yticks([row + query for row in rows for query in range(len(tokens[:Q]))])
        self.axes.set_yticklabels(tokens[:Q] * len(rows), **style)
        self.axes.set_xticks([column + key for column in columns for key in range(len(tokens[:K]))])
        self.axes.set_xticklabels(tokens[:K] * len(columns), rotation=90, **style)
        for label, row in zip(labels, rows, strict=True):
            self.write(label, 6, self.top + (row + Q / 2) * self.cell[0], 8)
        for head, column in enumerate(columns if self._are_heads else ()):
            self.write(head_heading(head), self.left + (column + K / 2) * self.cell[1], self.top - 9, 8, ha="center")

    def draw(self, patterns: Sequence[np.ndarray]) -> np.ndarray:
        """Draw patterns (H, Q, K) of each layer, in the shapes given before, as pixels (height, width, 3), uint8."""
        maps = np.full(self.grid, np.nan, dtype=np.float32)
        Q, K = self._largest
        for layer, pattern in enumerate(patterns):
            for head, weights in enumerate(pattern):
                row, column = layer * self._row, head * self._column
                times = Q // max(1, weights.shape[0]), K // max(1, weights.shape[1])
                weights = weights.repeat(times[0], axis=0).repeat(times[1], axis=1)
                maps[row : row + weights.shape[0], column : column + weights.shape[1]] = weights
        return self.paint(maps, self.norm)


class HeadMatrix(RepaintedGrid):
    """One statistic of every head: layers from top to bottom, heads from left to right, values written in the cells.

    Args:
        n_heads: number of heads of each layer.
        labels: label of each layer.
        title: title above the matrix.
        value_range: range of the values, ``low..high``; a bound that is no number is taken from the data of each
            drawing.
    """

    CELL = (28, 42)  # pixels: a number of six characters fits in

    def __init__(self, n_heads: Sequence[int], labels: Sequence[str], title: str, value_range: str = "..") -> None:
        self.grid = (len(n_heads), max(n_heads))
        left = 14 + CHARACTER_PIXELS * max(map(len, labels))
        right = max(20, 8 * len(title) - left - self.CELL[1] * self.grid[1])  # as far as the title goes
        super().__init__(self.grid, self.CELL, (left, right, 46, 10), title)
        self.low, self.high = bounds_of(value_range)
        label_matrix(self.axes, labels, self.grid[1])
        self.axes.tick_params(labeltop=True, labelbottom=False)
        self._font = ImageFont.truetype(findfont("DejaVu Sans"), 10)

    def draw(self, values: Sequence[np.ndarray]) -> np.ndarray:
        """Draw values (H,) of each layer as pixels (height, width, 3), uint8; NaN leaves a cell white."""
        matrix = as_matrix(values)
        norm = value_norm(matrix, self.low, self.high)
        drawn = Image.fromarray(self.paint(matrix, norm))
        ink = number_colours(matrix, norm, COLOURS)
        pen = ImageDraw.Draw(drawn)  # matplotlib takes 40 times as long for a short text
        for layer, row in enumerate(values):
            for head, value in enumerate(row):
                centre = (self.left + (head + 0.5) * self.cell[1], self.top + (layer + 0.5) * self.cell[0])
                pen.text(centre, short_number(value), str(ink[layer, head]), self._font, anchor="mm")
        return np.asarray(drawn)


class RepaintedMap:
    """Maps as ``plot_head`` draws them, of which only cells and title are drawn for each.

    Args:
        shape: (Q, K) of the maps.
        tokens: labels of the queries, and of the keys too, if there are as many.
        key_tokens: labels of the keys, where they differ from those of the queries.
        title: one of the titles, of which the longest decides how wide the figure is.
        vmax: weight with the brightest colour.

    Example:
        >>> import numpy as np
        >>> painter = RepaintedMap((20, 20), title="L03H00")
        >>> painter.draw(np.eye(20), "L03H00").shape == painter.draw(np.full((20, 20), 0.05), "L03H01").shape
        True
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        tokens: Sequence[str] | None = None,
        key_tokens: Sequence[str] | None = None,
        *,
        title: str,
        vmax: float = 1.0,
    ) -> None:
        self._shape = tuple(shape)
        ax = plot_head(np.zeros(self._shape), tokens, key_tokens, title=title, vmax=vmax, annotate=False)
        assert isinstance(ax.figure, Figure)
        self._axes, self._figure = ax, ax.figure
        # the frame lies over the cells
        self._changing = [ax.images[0], ax.title, *ax.spines.values()]
        for artist in self._changing:
            artist.set_animated(True)  # left out where the figure is drawn
        self._canvas = _drawn(self._figure)
        self._rest = self._canvas.copy_from_bbox(self._figure.bbox)

    @staticmethod
    def can_draw(shape: tuple[int, ...], vmax: float | None) -> bool:
        """Whether maps of that shape have no more that changes: no numbers in cells, and a colour bar that stays."""
        return max(shape) > MAX_WRITTEN and vmax is not None

    def draw(self, pattern: Any, title: str) -> np.ndarray:
        """Draw a map (Q, K) under its title, as pixels (height, width, 3), uint8.

        Raises:
            AttentionMonitorError: on a map of another shape.
        """
        weights = as_array(pattern, "pattern", "(Q, K)")
        if weights.shape != self._shape:
            raise AttentionMonitorError(
                f"This picture has maps of shape {self._shape}, got {weights.shape}; make another RepaintedMap for it."
            )
        self._canvas.restore_region(self._rest)
        self._axes.images[0].set_data(weights)
        self._axes.title.set_text(with_known_glyphs(title))
        for artist in self._changing:
            self._axes.draw_artist(artist)
        return _pixels(self._canvas)
