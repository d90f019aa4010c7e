"""What pictures are made of: colours, scales, labels, numbers in cells, and the room that they take."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..errors import AttentionMonitorError
from .fonts import font_families, short_token, with_known_glyphs


def short_number(value: float) -> str:
    """At most six characters."""
    if 0 < abs(value) < 0.005:
        return f"{value:.0e}".replace("e-0", "e-")
    if abs(value) < 10:
        return f"{value:.2f}"
    if abs(value) < 10_000:
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return f"{value:.0e}".replace("e+0", "e").replace("e+", "e")


COLOURS = colormaps["viridis"].with_extremes(bad="white")
DIFFERENCES = colormaps["RdBu_r"].with_extremes(bad="lightgrey")  # red: more weight

MAX_LABELS = 80  # positions of a map that get a label each; longer ones are numbered
MAX_WRITTEN = 12  # positions of a map up to which weights are written into its cells
LABEL_INCHES = 0.19  # that a position with a label takes
TITLE_INCHES = 0.095  # that a character of a title takes


def as_array(x: Any, name: str, *shapes: str) -> np.ndarray:
    """Numbers as numpy has them, float64; what is masked is NaN.

    Args:
        x: tensor or array, or a list of them.
        name: for the error.
        shapes: that it may have, such as "(H, Q, K)".
    """
    try:
        array = np.ma.asarray(_plain(x))
        if array.dtype.kind in "fiub" and array.ndim in [sum(map(str.isalpha, shape)) for shape in shapes]:
            return np.ma.filled(array.astype(np.float64), np.nan)
        got = f"{array.dtype} of shape {array.shape}"
    except ValueError:
        got = "parts of different shapes"
    raise AttentionMonitorError(f"{name} must be numbers of shape {' or '.join(shapes)}, got {got}.")


def _plain(x: Any) -> Any:
    if hasattr(x, "detach"):
        return x.detach().cpu().double().numpy()
    return [_plain(part) for part in x] if isinstance(x, list | tuple) else x


def difference_of(before: Any, after: Any, shape: str) -> np.ndarray:
    a, b = as_array(before, "before", shape), as_array(after, "after", shape)
    if a.shape != b.shape:
        raise AttentionMonitorError(f"Maps of one shape can be compared, got {a.shape} before and {b.shape} after.")
    with np.errstate(invalid="ignore"):  # of infinities
        return b - a


def weight_norm(maps: Sequence[np.ndarray] | np.ndarray, vmax: float | None) -> Normalize:
    return PowerNorm(0.5, 0, _checked_vmax(maps, vmax))


def difference_norm(maps: Sequence[np.ndarray], vmax: float | None) -> Normalize:
    vmax = _checked_vmax(maps, vmax)
    return Normalize(-vmax, vmax)


def _checked_vmax(maps: Sequence[np.ndarray] | np.ndarray, vmax: float | None) -> float:
    if vmax is None:
        return _largest(maps)
    if not vmax > 0:
        raise AttentionMonitorError(f"vmax must be more than 0, got {vmax}; None is the largest there is.")
    return vmax


def _largest(maps: Sequence[np.ndarray] | np.ndarray) -> float:
    """Largest magnitude, 1 where there is nothing but 0 or NaN."""
    return max((float(np.abs(m[np.isfinite(m)]).max(initial=0)) for m in maps), default=0) or 1.0


def checked_labels(labels: Sequence[Any] | None, n: int, name: str, of: str) -> list[str] | None:
    if labels is None:
        return None
    if isinstance(labels, str) or len(labels) != n:
        raise AttentionMonitorError(f"{name} must be a list with a label for each of {n} {of}, got {labels!r}.")
    return [str(label) for label in labels]


def _labels_of_map(
    shape: tuple[int, ...], tokens: Sequence[str] | None, key_tokens: Sequence[str] | None
) -> tuple[list[str] | None, list[str] | None]:
    """Labels of queries and keys."""
    Q, K = shape
    if key_tokens is None and tokens is not None and len(tokens) == K:
        key_tokens = tokens
    return checked_labels(tokens, Q, "tokens", "queries"), checked_labels(key_tokens, K, "key_tokens", "keys")


def new_axes(width: float, height: float) -> Axes:
    return Figure(figsize=(width, height), layout="constrained").subplots()


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
    """One map, with labels, weights in its cells and a colour bar of that name, as far as they are wanted."""
    if 0 in weights.shape:
        raise AttentionMonitorError(f"There is nothing to draw in a map of shape {weights.shape}.")
    labels = _labels_of_map(weights.shape, tokens, key_tokens)
    written = max(weights.shape) <= MAX_WRITTEN if annotate is None else annotate
    bar_axes = None
    if ax is None:
        ax, bar_axes = _axes_for_map(weights.shape, labels, written, title or "", colorbar is not None)
    ax.imshow(weights, cmap=colours, norm=norm, interpolation="nearest" if max(weights.shape) <= 100 else None,
              aspect="auto" if bar_axes or not 0.25 < weights.shape[0] / weights.shape[1] < 4 else "equal")  # fmt: skip
    _label(ax, *labels, fontsize=7)
    ax.set(xlabel="key", ylabel="query")
    set_title(ax, title)
    if written:
        write_cells(ax, weights, norm, colours, 6.5, lambda value: f"{value:.2f}" if value else "")  # 0: masked
    if colorbar is not None:
        where: dict[str, Any] = {"cax": bar_axes} if bar_axes else {"ax": ax, "fraction": 0.046, "pad": 0.03}
        bar = ax.figure.colorbar(ScalarMappable(norm, colours), **where)
        bar.set_label(colorbar, fontsize=8)
        bar.ax.tick_params(labelsize=7)
    return ax


def _axes_for_map(
    shape: tuple[int, ...], labels: tuple[list[str] | None, list[str] | None], written: bool, title: str, with_bar: bool
) -> tuple[Axes, Axes | None]:
    """Axes in a new figure with room for labels, title and colour bar, and those of the bar."""
    labelled = [of is not None and n <= MAX_LABELS for n, of in zip(shape, labels, strict=True)]
    if 0.25 < shape[0] / shape[1] < 4 and labelled[0] == labelled[1]:  # square cells
        cell = _side_inches(max(shape), labelled[0], written) / max(shape)
        height, width = shape[0] * cell, shape[1] * cell
    else:
        height, width = (_side_inches(n, of, written) for n, of in zip(shape, labelled, strict=True))
    left, bottom = (0.45 + _label_inches(of) for of in labels)
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
    """Side of a map with n positions."""
    return max(2.4, n * (0.34 if written else LABEL_INCHES)) if labelled else min(8.0, max(3.0, n / 50))


def _label_inches(labels: list[str] | None) -> float:
    """Length of the longest label of positions."""
    if labels is None or len(labels) > MAX_LABELS:
        return 0.3
    return 0.1 + 0.075 * max((len(short_token(label)) for label in labels), default=0)


def set_title(ax: Axes, title: str | None) -> None:
    if title:
        ax.set_title(with_known_glyphs(title), parse_math=False, fontsize=10, fontfamily=font_families(title))


def _label(ax: Axes, queries: list[str] | None, keys: list[str] | None, fontsize: float) -> None:
    """Labels of positions; numbers where there are none or too many."""
    for axis, labels, rotation in ((ax.yaxis, queries, 0), (ax.xaxis, keys, 90)):
        if labels is not None and len(labels) <= MAX_LABELS:
            texts = [short_token(label) for label in labels]
            families = font_families(texts)
            axis.set_ticks(
                range(len(texts)), texts, fontsize=fontsize, rotation=rotation, parse_math=False, fontfamily=families
            )
        else:
            axis.set_major_locator(MaxNLocator(integer=True))
            axis.set_tick_params(labelsize=fontsize)
        axis.set_tick_params(length=0 if labels is not None and len(labels) <= MAX_LABELS else 2, pad=2)


def write_cells(ax: Axes, values: np.ndarray, norm: Normalize, colours: Colormap, fontsize: float, form: Any) -> None:
    """Numbers into the cells, white on dark colours; NaN is left out."""
    shades = colours(norm(np.ma.masked_invalid(values)))[..., :3] @ (0.299, 0.587, 0.114)
    for (row, column), value in np.ndenumerate(values):
        if not np.isnan(value):
            colour = "white" if shades[row, column] < 0.5 else "black"
            ax.text(column, row, form(value), ha="center", va="center", fontsize=fontsize, color=colour)


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
    """Maps side by side on one page, with one colour bar."""
    if not maps or any(0 in m.shape for m in maps):
        raise AttentionMonitorError(f"There is nothing to draw in maps of shapes {[m.shape for m in maps]}.")
    names = checked_labels(names, len(maps), "names", "maps") or []
    labels = [_labels_of_map(m.shape, tokens, key_tokens) for m in maps]
    n = max(max(m.shape) for m in maps)
    columns = min(len(maps), max(1, round(np.sqrt(1.4 * len(maps)))))
    rows = -(-len(maps) // columns)
    side = n * LABEL_INCHES
    labelled = tokens is not None and n <= MAX_LABELS and columns * (side + 0.8) <= 26
    if labelled:
        room = max(_label_inches(of) for pair in labels for of in pair)
        side, gap = max(1.6, side), (0.15 + room, 0.3 + room)  # labels at the left and below, names above
    else:  # a pixel or more for each position, as far as 4000 pixels go
        side, gap = min(36 / columns, max(1.3, n / 100, min(4, 11 / columns))), (0.12, 0.28)
    left, top, bar = 0.15, 0.75 if title else 0.45, 0.75
    width, height = left + columns * (side + gap[0]) + bar, top + rows * (side + gap[1])
    width = max(width, left + TITLE_INCHES * len(title or ""))
    figure = Figure(figsize=(width, height))
    for i, (weights, name) in enumerate(zip(maps, names, strict=True)):
        row, column = divmod(i, columns)
        x, y = left + gap[0] + column * (side + gap[0]), top + row * (side + gap[1])
        ax = figure.add_axes((x / width, 1 - (y + side) / height, side / width, side / height))
        ax.imshow(weights, cmap=colours, norm=norm, aspect="auto", interpolation="nearest" if n <= 100 else None)
        if labelled:
            _label(ax, *labels[i], fontsize=6.5)
        else:
            ax.set(xticks=[], yticks=[])
        name = with_known_glyphs(name)
        fitting = max(3, int((side + gap[0]) / 0.075))
        name = name if len(name) <= fitting else "…" + name[1 - fitting :]
        ax.set_title(name, parse_math=False, fontsize=8, pad=2, fontfamily=font_families(name))
    x, length = left + columns * (side + gap[0]) + 0.15, min(3.0, height - top - 0.2)
    scale = figure.add_axes((x / width, 1 - (top + length) / height, 0.12 / width, length / height))
    figure.colorbar(ScalarMappable(norm, colours), cax=scale).ax.tick_params(labelsize=6)
    scale.set_title(colorbar.replace(" of ", "\nof "), fontsize=6)
    if title:
        families = font_families(title)
        place = left / width, 1 - 0.22 / height
        figure.text(*place, with_known_glyphs(title), fontsize=11, va="center", parse_math=False, fontfamily=families)
    return figure
