"""Arrays -> matplotlib figures and pixels. The only module that imports matplotlib; keeps no pyplot state.

A figure that is drawn again and again (``Redrawn``) draws its axes, ticks and labels once and only its data anew: the
labels of a token map cost far more than the map.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

PIXELS_PER_INCH = 100
MAX_TOKEN_LABELS = 40  # positions of a map that get a label each


class Redrawn:
    """A figure whose ``artists`` are drawn anew by ``pixels()``, over all the rest drawn once."""

    def __init__(self, figure: Figure, artists: Sequence[Artist]) -> None:
        self.canvas = FigureCanvasAgg(figure)
        self.artists = artists
        for artist in artists:
            artist.set_animated(True)  # leaves them out of the drawing of the rest
        self.canvas.draw()
        self._rest = self.canvas.copy_from_bbox(figure.bbox)

    def pixels(self) -> np.ndarray:
        """The figure as (height, width, 3) uint8."""
        self.canvas.restore_region(self._rest)
        for artist in self.artists:
            artist.axes.draw_artist(artist)  # type: ignore[union-attr]
        return np.array(self.canvas.buffer_rgba())[..., :3]


def readable(token: str) -> str:
    """A token as a short label: white space and control characters made visible, nothing interpreted."""
    text = token.replace(" ", "·").replace("\n", "↵").replace("\t", "→")
    text = "".join(c if c.isprintable() else "�" for c in text)
    return text if len(text) <= 12 else text[:11] + "…"


class Mosaic(Redrawn):
    """All maps of a model in one Axes: layers from top to bottom, heads from left to right.

    Within a map, queries from top to bottom, keys from left to right; colour is the weight, 0..1, on a square-root
    scale so that diffuse rows can be told apart.

    Args:
        shapes: (H, Q, K) for each layer.
        labels: for each layer.
        tokens: labels of the positions; None: positions are not labelled.
        title: above the maps.
    """

    def __init__(
        self, shapes: Sequence[tuple[int, int, int]], labels: Sequence[str], tokens: Sequence[str] | None, title: str
    ) -> None:
        self.shapes = list(shapes)
        n_heads, Q, K = (max(shape[axis] for shape in shapes) for axis in range(3))
        self._gap = max(1, round(max(Q, K) / 16))
        self._row, self._column = Q + self._gap, K + self._gap
        height = self._row * len(shapes) - self._gap
        width = self._column * n_heads - self._gap
        labelled = tokens is not None and max(Q, K) <= MAX_TOKEN_LABELS
        # whole pixels per cell: enough for a label beside it, or for a map of 120 pixels, up to 3000 in all
        cell = max(8 if labelled else 1, 120 // max(Q, K))
        cell = max(1, min(cell, 3000 // max(height, width)))
        left, right, top, bottom = (110, 70, 40, 80) if labelled else (70, 70, 40, 30)
        if any(len(label) > 4 for label in labels):
            left += 6 * max(len(label) for label in labels)
        pixels = (width * cell + left + right, height * cell + top + bottom)
        figure = Figure(figsize=(pixels[0] / PIXELS_PER_INCH, pixels[1] / PIXELS_PER_INCH), dpi=PIXELS_PER_INCH)
        axes = figure.add_axes(
            (left / pixels[0], bottom / pixels[1], width * cell / pixels[0], height * cell / pixels[1])
        )
        self._canvas_array = np.full((height, width), np.nan, dtype=np.float32)
        cmap = colormaps["viridis"].with_extremes(bad="white")
        self.image: AxesImage = axes.imshow(
            self._canvas_array, cmap=cmap, norm=PowerNorm(0.5, 0, 1), interpolation="nearest", aspect="auto"
        )
        bar = figure.add_axes(((pixels[0] - right + 12) / pixels[0], bottom / pixels[1], 10 / pixels[0], 0.0))
        bar.set_position((bar.get_position().x0, bottom / pixels[1], 10 / pixels[0], min(1.0, 200 / pixels[1])))
        figure.colorbar(self.image, cax=bar).ax.tick_params(labelsize=7)
        figure.text(left / pixels[0], 1 - 14 / pixels[1], title, fontsize=9, va="center", parse_math=False)
        self._ticks(axes, labels, n_heads, (Q, K), list(tokens) if labelled and tokens else [])
        super().__init__(figure, [self.image])

    def _ticks(self, axes, labels, n_heads, size, tokens) -> None:  # type: ignore[no-untyped-def]
        Q, K = size
        rows = [layer * self._row for layer in range(len(labels))]
        columns = [head * self._column for head in range(n_heads)]
        text = {"fontsize": 5.5, "parse_math": False}
        names = {"fontsize": 8, "parse_math": False}
        axes.tick_params(length=0, pad=2)
        for spine in axes.spines.values():
            spine.set_visible(False)
        if tokens:
            shown = [readable(token) for token in tokens]
            axes.set_yticks([r + q for r in rows for q in range(Q)], shown[:Q] * len(rows), **text)
            axes.set_xticks([c + k for c in columns for k in range(K)], shown[:K] * len(columns), rotation=90, **text)
            for label, r in zip(labels, rows, strict=True):
                x = -8 / axes.bbox.width * 10
                axes.text(
                    x, r + (Q - 1) / 2, label, transform=axes.get_yaxis_transform(), ha="right", va="center", **names
                )
        else:
            axes.set_yticks([r + (Q - 1) / 2 for r in rows], labels, **names)
        top = axes.secondary_xaxis("top")
        top.set_xticks([c + (K - 1) / 2 for c in columns], [f"H{head}" for head in range(n_heads)], **names)
        top.tick_params(length=0, pad=2)
        top.spines[:].set_visible(False)

    def draw(self, patterns: Sequence[np.ndarray]) -> np.ndarray:
        """Pixels (height, width, 3), uint8, for patterns (H, Q, K) of each layer, in the shapes given before."""
        for layer, pattern in enumerate(patterns):
            for head, weights in enumerate(pattern):
                row, column = layer * self._row, head * self._column
                self._canvas_array[row : row + weights.shape[0], column : column + weights.shape[1]] = weights
        self.image.set_data(self._canvas_array)
        return self.pixels()


def _finite_number(text: str) -> float | None:
    try:
        return float(text) if np.isfinite(float(text)) else None
    except ValueError:
        return None


class HeadMatrix(Redrawn):
    """One statistic of every head: layers from top to bottom, heads from left to right, values written in the cells.

    Args:
        n_heads: of each layer.
        labels: of each layer.
        title: above the matrix.
        value_range: of the values, ``low..high``; a bound that is no number is taken from the data of each drawing.
    """

    def __init__(self, n_heads: Sequence[int], labels: Sequence[str], title: str, value_range: str = "..") -> None:
        layers, columns = len(n_heads), max(n_heads)
        self.low, self.high = map(_finite_number, value_range.split(".."))
        left = 0.5 + 0.07 * max(0, max(map(len, labels)) - 3)
        size = (left + 0.42 * columns + 0.2, 0.6 + 0.28 * layers)
        figure = Figure(figsize=size, dpi=PIXELS_PER_INCH)
        axes = figure.add_axes((left / size[0], 0.1 / size[1], 0.42 * columns / size[0], 0.28 * layers / size[1]))
        cmap = colormaps["viridis"].with_extremes(bad="white")
        self.image: AxesImage = axes.imshow(
            np.full((layers, columns), np.nan), cmap=cmap, aspect="auto", interpolation="nearest"
        )
        axes.set_yticks(range(layers), labels, fontsize=8, parse_math=False)
        axes.set_xticks(range(columns), [f"H{head}" for head in range(columns)], fontsize=8)
        axes.tick_params(length=0, pad=2, labeltop=True, labelbottom=False)
        figure.text(0.08 / size[0], 1 - 0.14 / size[1], title, fontsize=9, va="center", parse_math=False)
        self.cells = [
            [axes.text(head, layer, "", ha="center", va="center", fontsize=7) for head in range(count)]
            for layer, count in enumerate(n_heads)
        ]
        super().__init__(figure, [self.image, *(cell for row in self.cells for cell in row)])

    def draw(self, values: Sequence[np.ndarray]) -> np.ndarray:
        """Pixels (height, width, 3), uint8, for values (H,) of each layer; NaN leaves a cell white."""
        matrix = np.full(self.image.get_array().shape, np.nan)  # type: ignore[union-attr]
        for layer, row in enumerate(values):
            matrix[layer, : len(row)] = row
        norm = Normalize(self.low, self.high)
        norm.autoscale_None(np.ma.masked_invalid(matrix))
        self.image.set(data=matrix, norm=norm)
        for layer, cells in enumerate(self.cells):
            for head, cell in enumerate(cells):
                value = matrix[layer, head]
                cell.set_text(f"{value:.3g}" if abs(value) >= 10 else f"{value:.2f}")
                cell.set_color("white" if np.isfinite(value) and norm(value) < 0.6 else "black")
        return self.pixels()
