"""One map, and a page of maps: how much room they take, and how they are drawn into it.

Sizes are in inches. A figure has 100 pixels an inch, unless matplotlib is told otherwise.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure

from ..errors import AttentionMonitorError
from .arrays import checked_labels, labels_of_map
from .drawing import (
    MAX_LABELS,
    TITLE_INCHES,
    add_colorbar,
    label_positions,
    set_title,
    show,
    text_style,
    write_cells,
)
from .fonts import short_token, with_known_glyphs

MAX_WRITTEN = 12  # positions up to which weights are written into cells: 12 x 12 numbers can still be taken in
LABEL_INCHES = 0.19  # side of a cell with a label beside it, 7 points with some air
NUMBER_INCHES = 0.34  # side of a cell with a number in it, four digits of 6.5 points
CHARACTER_INCHES = 0.075  # width of a character of a label
MAX_SQUARE = 4.0  # sides may differ by this factor where cells are square: beyond, the short side would be a line

# A page of maps
PAGE_ASPECT = 1.4  # width over height, that of a sheet of paper and about that of a screen
PAGE_WIDTH = 11.0  # width that small maps grow to fill: a sheet of paper
MAX_LABELLED_WIDTH = 26.0  # beyond, labels are too small to be read in a page that fits a screen
MAX_MAPS_WIDTH = 36.0  # of all maps: with gaps and colour bar, a page stays within 4000 pixels
BAR_INCHES = 0.75  # width of a page's colour bar with its numbers


def draw_map(
    weights: np.ndarray,
    tokens: Sequence[str] | None,
    key_tokens: Sequence[str] | None,
    ax: Axes | None,
    title: str | None,
    norm: Normalize,
    colours: Colormap,
    annotate: bool | None,
    colorbar: str | None,
) -> Axes:
    """Draw one map, with labels, weights in its cells and a colour bar, as far as they are wanted.

    Args:
        weights: (Q, K) weights.
        tokens: labels of the queries, and of the keys too, if there are as many.
        key_tokens: labels of the keys.
        ax: Axes to draw in; None: those of a new figure of a fitting size.
        title: title above the map.
        norm: scale of the weights.
        colours: colours of the scale.
        annotate: whether to write weights into the cells; None: if there are at most 12 x 12.
        colorbar: name of the colour bar; None: no bar.
    """
    if 0 in weights.shape:
        raise AttentionMonitorError(
            f"There is nothing to draw in a map of shape {weights.shape}; give one with a query and a key or more."
        )
    labels = labels_of_map(weights.shape, tokens, key_tokens)
    written = max(weights.shape) <= MAX_WRITTEN if annotate is None else annotate
    bar_axes = None
    if ax is None:
        ax, bar_axes = _axes_for_map(weights.shape, labels, written, title or "", colorbar is not None)
    show(ax, weights, norm, colours, "auto" if bar_axes or not _has_square_cells(weights.shape) else "equal")
    label_positions(ax, *labels, fontsize=7)
    ax.set(xlabel="key", ylabel="query")
    set_title(ax, title)
    if written:
        # weights of exactly 0 are masked, and stay without a number
        write_cells(ax, weights, norm, colours, 6.5, lambda value: f"{value:.2f}" if value else "")
    if colorbar is not None:
        # in Axes that were given, the bar takes a part of them that leaves it as high as a square map
        place = {"cax": bar_axes} if bar_axes else {"ax": ax, "fraction": 0.046, "pad": 0.03}
        add_colorbar(ax.figure, norm, colours, **place).set_label(colorbar, fontsize=8)
    return ax


def _has_square_cells(shape: tuple[int, ...]) -> bool:
    return 1 / MAX_SQUARE < shape[0] / shape[1] < MAX_SQUARE


def _axes_for_map(
    shape: tuple[int, ...], labels: tuple[list[str] | None, list[str] | None], written: bool, title: str, with_bar: bool
) -> tuple[Axes, Axes | None]:
    """Make Axes in a new figure with room for labels, title and colour bar, and Axes of the bar."""
    labelled = [of is not None and n <= MAX_LABELS for n, of in zip(shape, labels, strict=True)]
    if _has_square_cells(shape) and labelled[0] == labelled[1]:
        cell = _side_inches(max(shape), labelled[0], written) / max(shape)
        height, width = shape[0] * cell, shape[1] * cell
    else:
        height, width = (_side_inches(n, of, written) for n, of in zip(shape, labelled, strict=True))
    left, bottom = (0.45 + _label_inches(of) for of in labels)  # with the names of the axes, query and key
    right = 0.95 if with_bar else 0.15
    # a title is centred over the map, and may be wider
    beyond = TITLE_INCHES * len(title) / 2 - width / 2
    left, right = max(left, beyond), max(right, beyond)
    total = left + width + right, bottom + height + 0.35
    figure = Figure(figsize=total)

    def axes(x: float, y: float, w: float, h: float) -> Axes:
        return figure.add_axes((x / total[0], y / total[1], w / total[0], h / total[1]))

    of_map, bar_height = axes(left, bottom, width, height), min(height, 4.0)
    return of_map, axes(left + width + 0.12, bottom + height - bar_height, 0.14, bar_height) if with_bar else None


def _side_inches(n: int, labelled: bool, written: bool) -> float:
    """Return the side of a map with n positions."""
    if labelled:
        return max(2.4, n * (NUMBER_INCHES if written else LABEL_INCHES))
    return min(8.0, max(3.0, n / 50))  # two pixels a position, as far as a screen goes


def _label_inches(labels: list[str] | None) -> float:
    """Return the length of the longest label of positions; numbers take 0.3."""
    if labels is None or len(labels) > MAX_LABELS:
        return 0.3
    return 0.1 + CHARACTER_INCHES * max((len(short_token(label)) for label in labels), default=0)


@dataclass(frozen=True)
class _Page:
    """Where the maps of a page stand, and how large they are.

    Attributes:
        columns: number of maps side by side.
        rows: number of rows of maps.
        labelled: whether positions have labels.
        side: side of a map.
        gap: room at the left of a map and below it, for labels and for names.
        top: height of what is above the first row.
        title: title of the page, or "".
    """

    columns: int
    rows: int
    labelled: bool
    side: float
    gap: tuple[float, float]
    top: float
    title: str

    LEFT = 0.15  # margin

    @property
    def right(self) -> float:
        """Right edge of the last column."""
        return self.LEFT + self.columns * (self.side + self.gap[0])

    @property
    def width(self) -> float:
        return max(self.right + BAR_INCHES, self.LEFT + TITLE_INCHES * len(self.title))

    @property
    def height(self) -> float:
        return self.top + self.rows * (self.side + self.gap[1])

    def axes(self, figure: Figure, x: float, y: float, width: float, height: float) -> Axes:
        """Make Axes whose top left corner is at (x, y), counted from the top left corner of the page."""
        bottom = 1 - (y + height) / self.height
        return figure.add_axes((x / self.width, bottom, width / self.width, height / self.height))

    def axes_of_map(self, figure: Figure, i: int) -> Axes:
        """Make the Axes of the map of number i."""
        row, column = divmod(i, self.columns)
        x = self.LEFT + self.gap[0] + column * (self.side + self.gap[0])
        return self.axes(figure, x, self.top + row * (self.side + self.gap[1]), self.side, self.side)


def _page(n_maps: int, n: int, room: float | None, title: str) -> _Page:
    """Choose the layout of a page.

    Args:
        n_maps: number of maps.
        n: positions of the largest one.
        room: length of the longest label of positions; None: there are no labels.
        title: title of the page, or "".
    """
    columns = min(n_maps, max(1, round(np.sqrt(PAGE_ASPECT * n_maps))))
    rows = -(-n_maps // columns)
    top = 0.75 if title else 0.45
    side = n * LABEL_INCHES
    # 0.8: room for labels of usual length
    if room is not None and n <= MAX_LABELS and columns * (side + 0.8) <= MAX_LABELLED_WIDTH:
        # labels at the left and below, names above
        return _Page(columns, rows, True, max(1.6, side), (0.15 + room, 0.3 + room), top, title)
    # a pixel or more for each position, as far as the width goes
    side = max(1.3, n / 100, min(4, PAGE_WIDTH / columns))
    return _Page(columns, rows, False, min(MAX_MAPS_WIDTH / columns, side), (0.12, 0.28), top, title)


def draw_page(
    maps: Sequence[np.ndarray],
    names: Sequence[str],
    tokens: Sequence[str] | None,
    key_tokens: Sequence[str] | None,
    title: str | None,
    norm: Normalize,
    colours: Colormap,
    colorbar: str,
) -> Figure:
    """Draw maps (Q, K) side by side on one page, each under its name, with one colour bar."""
    if not maps or any(0 in m.shape for m in maps):
        raise AttentionMonitorError(
            f"There is nothing to draw in maps of shapes {[m.shape for m in maps]}; "
            "give one map or more, each with a query and a key or more."
        )
    names = checked_labels(names, len(maps), "names", "maps") or []
    labels = [labels_of_map(m.shape, tokens, key_tokens) for m in maps]
    room = None if tokens is None else max(_label_inches(of) for pair in labels for of in pair)
    page = _page(len(maps), max(max(m.shape) for m in maps), room, title or "")
    figure = Figure(figsize=(page.width, page.height))
    most = max(3, int((page.side + page.gap[0]) / CHARACTER_INCHES))  # characters of a name
    for i, (weights, name) in enumerate(zip(maps, names, strict=True)):
        ax = page.axes_of_map(figure, i)
        show(ax, weights, norm, colours)
        if page.labelled:
            label_positions(ax, *labels[i], fontsize=6.5)
        else:
            ax.set(xticks=[], yticks=[])
        name = with_known_glyphs(name)
        name = name if len(name) <= most else "…" + name[1 - most :]  # the end of a path says more than its beginning
        ax.set_title(name, fontsize=8, pad=2, **text_style(name))
    bar = page.axes(figure, page.right + 0.15, page.top, 0.12, min(3.0, page.height - page.top - 0.2))
    add_colorbar(figure, norm, colours, 6, cax=bar)
    bar.set_title(colorbar.replace(" of ", "\nof "), fontsize=6)
    if title:
        place = page.LEFT / page.width, 1 - 0.22 / page.height
        figure.text(*place, with_known_glyphs(title), fontsize=11, va="center", **text_style(title))
    return figure
