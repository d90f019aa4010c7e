"""What pictures are made of: colours, scales, titles, labels, numbers in cells and colour bars.

Pictures that are drawn once (``figures``, ``values``) and those that are repainted (``repainted``) share them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.colors import Colormap, Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

from ..errors import AttentionMonitorError
from ..naming import head_heading
from .fonts import font_families, short_token, with_known_glyphs

COLOURS = colormaps["viridis"].with_extremes(bad="white")
DIFFERENCES = colormaps["RdBu_r"].with_extremes(bad="lightgrey")  # red: more weight

MAX_LABELS = 80  # positions that get a label each: they make a map of 15 inches, as much as a screen shows of a figure
MAX_SHARP = 100  # cells along a side with sharp edges: a map has 200 pixels or more, so that each cell has two
TITLE_INCHES = 0.095  # width of a character of a title, 10 points


# Scales: value -> place on a colour scale, 0..1


def weight_norm(maps: Sequence[np.ndarray] | np.ndarray, vmax: float | None) -> Normalize:
    """Make a square-root scale for weights from 0 to ``vmax``, or to the largest weight of the maps."""
    return PowerNorm(0.5, 0, _checked_vmax(maps, vmax))


def difference_norm(maps: Sequence[np.ndarray], vmax: float | None) -> Normalize:
    """Make a scale for differences from -``vmax`` to ``vmax``, or of the largest magnitude in the maps."""
    vmax = _checked_vmax(maps, vmax)
    return Normalize(-vmax, vmax)


def _checked_vmax(maps: Sequence[np.ndarray] | np.ndarray, vmax: float | None) -> float:
    if vmax is None:  # 1 where there is nothing but 0 or NaN
        return max((float(np.abs(m[np.isfinite(m)]).max(initial=0)) for m in maps), default=0) or 1.0
    if not vmax > 0:
        raise AttentionMonitorError(
            f"vmax must be more than 0, got {vmax}; give None for the largest value that there is."
        )
    return vmax


def value_norm(matrix: np.ndarray, low: float | None, high: float | None) -> Normalize:
    """Make a scale for values of heads, from ``low`` to ``high``; None: as far as the finite values go."""
    finite = matrix[np.isfinite(matrix)]
    norm = Normalize(low, high)
    norm.autoscale_None(finite if len(finite) else np.zeros(1))
    # all values may lie beyond the one bound that is given: by rounding, or because there are none
    if high is None:
        norm.vmax = max(norm.vmin or 0, norm.vmax or 0)
    elif low is None:
        norm.vmin = min(norm.vmin or 0, norm.vmax or 0)
    return norm


def bounds_of(value_range: str) -> tuple[float | None, float | None]:
    """Return the bounds of a statistic's range, None where one is not a finite number.

    Example:
        >>> bounds_of("0..1"), bounds_of("0..ln n_i"), bounds_of("-inf..inf")
        ((0.0, 1.0), (0.0, None), (None, None))
    """
    low, high = map(_finite_number, value_range.split(".."))
    return low, high


def _finite_number(text: str) -> float | None:
    try:
        return float(text) if np.isfinite(float(text)) else None
    except ValueError:
        return None


# Numbers in cells


def short_number(value: float) -> str:
    """Write a number in at most six characters.

    Example:
        >>> short_number(0.5), short_number(12.34), short_number(-1670.2), short_number(2e-8)
        ('0.50', '12.3', '-1670', '2e-8')
    """
    if 0 < abs(value) < 0.005:
        return f"{value:.0e}".replace("e-0", "e-")
    if abs(value) < 10:
        return f"{value:.2f}"
    if abs(value) < 10_000:
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return f"{value:.0e}".replace("e+0", "e").replace("e+", "e")


def number_colours(values: np.ndarray, norm: Normalize, colours: Colormap) -> np.ndarray:
    """Choose the colour of the number in each cell: white on dark colours, black elsewhere and where there is none."""
    place = norm(np.ma.masked_invalid(values))  # on the scale, 0..1
    dark = place < 0.6 if colours is COLOURS else np.abs(place - 0.5) > 0.3  # DIFFERENCES are dark at both ends
    return np.where(np.ma.filled(dark, False), "white", "black")


def write_cells(
    ax: Axes, values: np.ndarray, norm: Normalize, colours: Colormap, fontsize: float, form: Callable[[float], str]
) -> None:
    """Write numbers into the cells; NaN is left out."""
    ink = number_colours(values, norm, colours)
    for (row, column), value in np.ndenumerate(values):
        if not np.isnan(value):
            ax.text(column, row, form(value), ha="center", va="center", fontsize=fontsize, color=ink[row, column])


# Axes, their images, titles, labels and colour bars


def new_axes(width: float, height: float) -> Axes:
    """Make Axes in a figure of that size in inches."""
    return Figure(figsize=(width, height), layout="constrained").subplots()


def show(ax: Axes, values: np.ndarray, norm: Normalize, colours: Colormap, aspect: str = "auto") -> AxesImage:
    """Show values as coloured cells, sharp as long as there are more pixels than cells."""
    sharp = max(values.shape) <= MAX_SHARP  # beyond, cells are averaged: none is lost between two pixels
    return ax.imshow(values, cmap=colours, norm=norm, aspect=aspect, interpolation="nearest" if sharp else None)  # type: ignore[arg-type]


def text_style(texts: Sequence[str]) -> dict[str, Any]:
    """Return what every text takes: nothing is read as a formula, and fonts have all characters."""
    return {"parse_math": False, "fontfamily": font_families(texts)}


def set_title(ax: Axes, title: str | None) -> None:
    """Write a title above the Axes, if there is one."""
    if title:
        ax.set_title(with_known_glyphs(title), fontsize=10, **text_style(title))


def label_positions(ax: Axes, queries: list[str] | None, keys: list[str] | None, fontsize: float) -> None:
    """Label queries and keys; number them where there are no labels, or too many."""
    for axis, labels, rotation in ((ax.yaxis, queries, 0), (ax.xaxis, keys, 90)):
        if labels is not None and len(labels) <= MAX_LABELS:
            texts = [short_token(label) for label in labels]
            axis.set_ticks(range(len(texts)), texts, fontsize=fontsize, rotation=rotation, **text_style(texts))
            axis.set_tick_params(length=0, pad=2)
        else:
            axis.set_major_locator(MaxNLocator(integer=True))
            axis.set_tick_params(labelsize=fontsize, length=2, pad=2)


def label_matrix(ax: Axes, layers: Sequence[str], n_heads: int | None) -> None:
    """Label a matrix: names of layers at the left, a heading for each head; None: they are numbered."""
    names = [with_known_glyphs(name) for name in layers]
    ax.set_yticks(range(len(names)), names, fontsize=8, **text_style(names))
    if n_heads is None:
        ax.set_xlabel("head")
    else:
        ax.set_xticks(range(n_heads), [head_heading(head) for head in range(n_heads)], fontsize=8)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)


def add_colorbar(figure: Any, norm: Normalize, colours: Colormap, labelsize: float = 7, **place: Any) -> Colorbar:
    """Draw a colour bar; ``place`` is what ``Figure.colorbar`` takes: ``cax``, or ``ax`` and a fraction of it."""
    bar = figure.colorbar(ScalarMappable(norm, colours), **place)
    bar.ax.tick_params(labelsize=labelsize)
    return bar
