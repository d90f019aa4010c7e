"""Arrays -> pixels, while a model trains.

A picture that is drawn at every sample (``Live``) has its axes, ticks and labels drawn once, by matplotlib, and its
data painted over that each time, a whole number of pixels a cell: drawing all of it anew takes ten times as long.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont

from ..naming import head_heading
from .drawing import COLOURS, short_number
from .fonts import font_families, short_token

DPI = 100
MAX_TOKEN_LABELS = 40  # positions of a map that get a label each


class Live:
    """A grid of coloured cells in a figure of which all but the cells is drawn once.

    Args:
        grid: (rows, columns).
        cell: (height, width) of a cell in pixels.
        margins: left, right, top, bottom in pixels.
        title: above the grid.
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
        """Axes at a place in pixels from the top left."""
        W, H = self._total
        return self.figure.add_axes((left / W, (H - top - height) / H, width / W, height / H))

    def write(self, text: str, x: float, y: float, fontsize: float, ha: str = "left") -> None:
        """Text with the middle of its height at a place in pixels from the top left."""
        W, H = self._total
        self.figure.text(x / W, 1 - y / H, text, fontsize=fontsize, ha=ha, va="center", parse_math=False)

    def paint(self, values: np.ndarray, norm: Normalize) -> np.ndarray:
        """Pixels (height, width, 3), uint8, with ``values`` (rows, columns) in the cells; NaN is white."""
        if self._rest is None:
            canvas = FigureCanvasAgg(self.figure)
            canvas.draw()
            self._rest = np.array(canvas.buffer_rgba())[..., :3]
        colours = COLOURS(norm(np.ma.masked_invalid(values)), bytes=True)[..., :3]
        cells = colours.repeat(self.cell[0], axis=0).repeat(self.cell[1], axis=1)
        pixels = self._rest.copy()
        pixels[self.top : self.top + cells.shape[0], self.left : self.left + cells.shape[1]] = cells
        return pixels


class Mosaic(Live):
    """All maps of a model in one Axes: layers from top to bottom, heads from left to right.

    Within a map, queries from top to bottom, keys from left to right; colour is the weight, 0..1, on a square-root
    scale so that diffuse rows can be told apart. Where maps differ in size, the smaller ones are stretched.

    Args:
        shapes: (H, Q, K) for each layer.
        labels: for each layer.
        tokens: labels of the positions; None: positions are not labelled.
        title: above the maps.
        are_heads: columns are heads, and labelled so.
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
        gap = max(1, round(max(Q, K) / 16))
        self._row, self._column = Q + gap, K + gap
        self.grid = (self._row * len(shapes) - gap, self._column * n_heads - gap)
        labelled = tokens is not None and max(Q, K) <= MAX_TOKEN_LABELS
        # whole pixels per cell: enough for a label beside it, or for a map of 120 pixels, up to 3000 in all
        cell = max(8 if labelled else 1, 120 // max(Q, K))
        cell = max(1, min(cell, 3000 // max(self.grid)))
        label_width = 8 + 7 * max(map(len, labels))
        left, bottom = (label_width + 70, 80) if labelled else (label_width + 6, 12)
        super().__init__(self.grid, (cell, cell), (left, 70, 40, bottom), title)
        self.norm = PowerNorm(0.5, 0, 1)
        self._label(labels, n_heads, (Q, K), [short_token(token) for token in tokens or ()] if labelled else [])
        bar_height = min(self.grid[0] * cell, 200)
        bar = self.add_axes(left + self.grid[1] * cell + 12, 40, 10, bar_height)
        self.figure.colorbar(ScalarMappable(self.norm, COLOURS), cax=bar).ax.tick_params(labelsize=7)

    def _label(self, labels: Sequence[str], n_heads: int, size: tuple[int, int], tokens: list[str]) -> None:
        Q, K = size
        rows = [layer * self._row for layer in range(len(labels))]
        columns = [head * self._column for head in range(n_heads)]
        style: dict[str, Any] = {"fontsize": 5.5, "parse_math": False, "fontfamily": font_families(tokens)}
        self.axes.set_yticks([row + query for row in rows for query in range(len(tokens[:Q]))])
        self.axes.set_yticklabels(tokens[:Q] * len(rows), **style)
        self.axes.set_xticks([column + key for column in columns for key in range(len(tokens[:K]))])
        self.axes.set_xticklabels(tokens[:K] * len(columns), rotation=90, **style)
        for label, row in zip(labels, rows, strict=True):
            self.write(label, 6, self.top + (row + Q / 2) * self.cell[0], 8)
        for head, column in enumerate(columns if self._are_heads else ()):
            self.write(head_heading(head), self.left + (column + K / 2) * self.cell[1], self.top - 9, 8, ha="center")

    def draw(self, patterns: Sequence[np.ndarray]) -> np.ndarray:
        """Pixels (height, width, 3), uint8, for patterns (H, Q, K) of each layer, in the shapes given before."""
        maps = np.full(self.grid, np.nan, dtype=np.float32)
        Q, K = self._largest
        for layer, pattern in enumerate(patterns):
            for head, weights in enumerate(pattern):
                row, column = layer * self._row, head * self._column
                times = Q // max(1, weights.shape[0]), K // max(1, weights.shape[1])
                weights = weights.repeat(times[0], axis=0).repeat(times[1], axis=1)
                maps[row : row + weights.shape[0], column : column + weights.shape[1]] = weights
        return self.paint(maps, self.norm)


class HeadMatrix(Live):
    """One statistic of every head: layers from top to bottom, heads from left to right, values written in the cells.

    Args:
        n_heads: of each layer.
        labels: of each layer.
        title: above the matrix.
        value_range: of the values, ``low..high``; a bound that is no number is taken from the data of each drawing.
    """

    def __init__(self, n_heads: Sequence[int], labels: Sequence[str], title: str, value_range: str = "..") -> None:
        self.grid = (len(n_heads), max(n_heads))
        left = 14 + 7 * max(map(len, labels))
        margins = (left, max(20, 8 * len(title) - left - 42 * self.grid[1]), 46, 10)
        super().__init__(self.grid, (28, 42), margins, title)
        self.low, self.high = map(_finite_number, value_range.split(".."))
        self.axes.set_yticks(range(self.grid[0]), labels, fontsize=8, parse_math=False)
        self.axes.set_xticks(range(self.grid[1]), [head_heading(head) for head in range(self.grid[1])], fontsize=8)
        self.axes.tick_params(labeltop=True, labelbottom=False)
        self._font = ImageFont.truetype(findfont("DejaVu Sans"), 10)

    def draw(self, values: Sequence[np.ndarray]) -> np.ndarray:
        """Pixels (height, width, 3), uint8, for values (H,) of each layer; NaN leaves a cell white."""
        matrix = np.full(self.grid, np.nan)
        for layer, row in enumerate(values):
            matrix[layer, : len(row)] = row
        norm = Normalize(self.low, self.high)
        norm.autoscale_None(np.ma.masked_invalid(np.nan_to_num(matrix) if np.isnan(matrix).all() else matrix))
        drawn = Image.fromarray(self.paint(matrix, norm))
        dark = np.ma.filled(norm(np.ma.masked_invalid(matrix)) < 0.6, False)
        pen = ImageDraw.Draw(drawn)  # matplotlib takes 40 times as long for a short text
        for layer, row in enumerate(values):
            for head, value in enumerate(row):
                centre = (self.left + (head + 0.5) * self.cell[1], self.top + (layer + 0.5) * self.cell[0])
                pen.text(
                    centre, short_number(value), "white" if dark[layer, head] else "black", self._font, anchor="mm"
                )
        return np.asarray(drawn)


def _finite_number(text: str) -> float | None:
    try:
        return float(text) if np.isfinite(float(text)) else None
    except ValueError:
        return None
