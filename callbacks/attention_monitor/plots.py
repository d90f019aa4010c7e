"""Arrays -> matplotlib: pictures of attention for papers, notebooks and the command line.

Functions take arrays (numpy, or torch tensors on any device and in any dtype) and an optional ``Axes``, and return the
``Axes`` or ``Figure`` they drew in, in the habit of matplotlib and seaborn. Nothing is shown or saved, and pyplot is
not touched: save with ``axes.figure.savefig(path)``; a notebook shows ``axes.figure`` after ``%matplotlib inline``.

Shapes: L layers, H heads, Q queries, K keys. In a map queries go downwards and keys across; colour is the weight on a
square-root scale, so that diffuse rows can be told apart. Colours are safe for the colour-blind.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.animation import FuncAnimation
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .errors import AttentionMonitorError
from .labels import drawable, font_families, readable, short_number

COLOURS = colormaps["viridis"].with_extremes(bad="white")
DIFFERENCES = colormaps["RdBu_r"].with_extremes(bad="lightgrey")  # red: more weight

MAX_LABELS = 80  # positions of a map that get a label each; longer ones are numbered
MAX_WRITTEN = 12  # positions of a map up to which weights are written into its cells
LABEL_INCHES = 0.19  # that a position with a label takes
TITLE_INCHES = 0.095  # that a character of a title takes


def plot_head(
    pattern: Any,
    tokens: Sequence[str] | None = None,
    key_tokens: Sequence[str] | None = None,
    *,
    ax: Axes | None = None,
    title: str | None = None,
    vmax: float | None = 1.0,
    annotate: bool | None = None,
    colorbar: bool = True,
) -> Axes:
    """The map of one head.

    Args:
        pattern: (Q, K) weights.
        tokens: labels of the queries, and of the keys too, if there are as many.
        key_tokens: labels of the keys, where they are others (cross-attention).
        ax: where to draw; None: a new figure of a fitting size.
        title: above the map.
        vmax: weight with the brightest colour; None: the largest there is.
        annotate: write weights into the cells; None: if there are at most 12 x 12.
        colorbar: draw one beside the map.

    Raises:
        AttentionMonitorError: on an array of another shape, or labels of another number.
    """
    weights = _array(pattern, "pattern", "(Q, K)")
    norm = _weight_norm([weights], vmax)
    return _map(weights, tokens, key_tokens, ax, title, norm, COLOURS, annotate, "weight" if colorbar else None)


def plot_difference(
    before: Any,
    after: Any,
    tokens: Sequence[str] | None = None,
    key_tokens: Sequence[str] | None = None,
    *,
    ax: Axes | None = None,
    title: str | None = None,
    vmax: float | None = None,
    annotate: bool | None = None,
    colorbar: bool = True,
) -> Axes:
    """How the map of one head has changed, after - before, on a diverging scale with 0 in its middle.

    Args:
        before: (Q, K) weights.
        after: (Q, K) weights.
        vmax: difference with the strongest colour; None: the largest there is.

    The others are those of ``plot_head``.
    """
    difference = _difference(before, after, "(Q, K)")
    norm = _difference_norm([difference], vmax)
    label = "difference of weights" if colorbar else None
    return _map(difference, tokens, key_tokens, ax, title, norm, DIFFERENCES, annotate, label)


def plot_heads(
    patterns: Any,
    tokens: Sequence[str] | None = None,
    key_tokens: Sequence[str] | None = None,
    *,
    names: Sequence[str] | None = None,
    title: str | None = None,
    vmax: float | None = 1.0,
) -> Figure:
    """The maps of several heads, side by side, with one colour scale.

    Args:
        patterns: (H, Q, K) weights.
        tokens: labels of the queries, and of the keys too, if there are as many; not drawn where there is no room.
        key_tokens: labels of the keys, where they are others.
        names: of the heads; None: H0, H1, ...
        title: above the maps.
        vmax: weight with the brightest colour; None: the largest there is.
    """
    maps = list(_array(patterns, "patterns", "(H, Q, K)"))
    names = [f"H{head}" for head in range(len(maps))] if names is None else names
    return _page(maps, names, tokens, key_tokens, title, _weight_norm(maps, vmax), COLOURS, "weight")


def plot_differences(
    before: Any,
    after: Any,
    tokens: Sequence[str] | None = None,
    key_tokens: Sequence[str] | None = None,
    *,
    names: Sequence[str] | None = None,
    title: str | None = None,
    vmax: float | None = None,
) -> Figure:
    """``plot_difference`` of several heads (H, Q, K), side by side, with one colour scale."""
    maps = list(_difference(before, after, "(H, Q, K)"))
    names = [f"H{head}" for head in range(len(maps))] if names is None else names
    norm = _difference_norm(maps, vmax)
    return _page(maps, names, tokens, key_tokens, title, norm, DIFFERENCES, "difference of weights")


def plot_layers(
    patterns: Sequence[Any],
    tokens: Sequence[str] | None = None,
    key_tokens: Sequence[str] | None = None,
    *,
    names: Sequence[str] | None = None,
    title: str | None = None,
    vmax: float | None = 1.0,
) -> Figure:
    """A map for each layer, averaged over its heads.

    Args:
        patterns: of each layer (H, Q, K), which is averaged over H, or (Q, K); layers may differ in their shapes.
        names: of the layers; None: L0, L1, ...

    The others are those of ``plot_heads``.
    """
    maps = []
    for layer in patterns:
        weights = _array(layer, "a layer's pattern", "(H, Q, K)", "(Q, K)")
        maps.append(weights.mean(0) if weights.ndim == 3 else weights)
    names = [f"L{layer}" for layer in range(len(maps))] if names is None else names
    return _page(maps, names, tokens, key_tokens, title, _weight_norm(maps, vmax), COLOURS, "weight")


def plot_flow(
    flow: Mapping[str, Sequence[Any]],
    names: Sequence[str] | None = None,
    *,
    ax: Axes | None = None,
    title: str | None = None,
) -> Axes:
    """Where attention goes from layer to layer: lines are means over heads, bands reach from the lowest to the highest.

    Args:
        flow: what it goes to -> for each layer the share of each head, (H,), or one number; NaN is left out.
        names: of the layers; None: their numbers.
        ax: where to draw; None: a new figure.
    """
    lines = {what: [_array(x, what, "(H,)", "()").reshape(-1) for x in shares] for what, shares in flow.items()}
    if not lines or len({len(shares) for shares in lines.values()} | {0}) != 2:
        found = {what: len(shares) for what, shares in lines.items()}
        raise AttentionMonitorError(f"flow must have the same layers, one or more, for each line, got {found}.")
    n_layers = len(next(iter(lines.values())))
    names = _checked_labels(names, n_layers, "names", "layers") or [str(layer) for layer in range(n_layers)]
    if ax is None:
        ax = _new_axes(max(4.5, min(16, 1.5 + 0.45 * n_layers), TITLE_INCHES * len(title or "")), 3.6)
    layers = np.arange(n_layers)
    for i, (what, shares) in enumerate(lines.items()):
        finite = [x[np.isfinite(x)] for x in shares]
        mean, low, high = (
            np.array([reduce(x) if len(x) else np.nan for x in finite]) for reduce in (np.mean, np.min, np.max)
        )
        ax.plot(layers, mean, color=f"C{i}", marker="osD^v"[i % 5], label=what)
        ax.fill_between(layers, low, high, color=f"C{i}", alpha=0.15, linewidth=0)
    ax.set(ylim=(-0.02, 1.02), xlabel="layer", ylabel="share of attention")
    long = max(map(len, names)) > 4
    ax.set_xticks(layers, names, parse_math=False, rotation=90 if long else 0, fontsize=7 if long else 9)
    ax.legend(loc="best", framealpha=0.6)
    _set_title(ax, title)
    return ax


def plot_matrix(
    values: Sequence[Any],
    names: Sequence[str] | None = None,
    *,
    ax: Axes | None = None,
    title: str | None = None,
    vmin: float | None = None,
    vmax: float | None = None,
    annotate: bool | None = None,
    colorbar: bool = True,
) -> Axes:
    """One number of every head: layers downwards, heads across.

    Args:
        values: (L, H), or (H,) of each layer, where layers differ in their heads; NaN leaves a cell white.
        names: of the layers; None: L0, L1, ...
        ax: where to draw; None: a new figure.
        vmin: value with the darkest colour; None: the smallest there is.
        vmax: value with the brightest colour; None: the largest there is.
        annotate: write values into the cells; None: if there are at most 32 heads.
        colorbar: draw one beside the matrix.
    """
    values = values.to_numpy() if hasattr(values, "to_numpy") else values  # a table of pandas is iterated by columns
    rows = [_array(row, "a row of values", "(H,)") for row in values]
    if not rows or not max(map(len, rows)):
        raise AttentionMonitorError("values must have a layer with a head, (L, H), got none.")
    matrix = np.full((len(rows), max(map(len, rows))), np.nan)
    for layer, row in enumerate(rows):
        matrix[layer, : len(row)] = row
    names = _checked_labels(names, len(rows), "names", "layers") or [f"L{layer}" for layer in range(len(rows))]
    written = matrix.shape[1] <= 32 if annotate is None else annotate
    if ax is None:
        cell = 0.5 if written else 0.2
        label = 0.09 * max(map(len, names))
        width = max(3, matrix.shape[1] * cell + label + 1.2, TITLE_INCHES * len(title or "") + 2 * label)
        ax = _new_axes(width, max(1.5, matrix.shape[0] * 0.3 + 0.9))
    if vmin is not None and vmax is not None and vmin > vmax:
        raise AttentionMonitorError(f"vmin must not be more than vmax, got {vmin} and {vmax}.")
    norm = Normalize(vmin, vmax)
    finite = matrix[np.isfinite(matrix)]
    norm.autoscale_None(finite if len(finite) else np.zeros(1))
    ax.imshow(matrix, cmap=COLOURS, norm=norm, aspect="auto", interpolation="nearest")
    names = [drawable(name) for name in names]
    ax.set_yticks(range(len(rows)), names, parse_math=False, fontsize=8, fontfamily=font_families(names))
    if matrix.shape[1] <= 32:
        ax.set_xticks(range(matrix.shape[1]), [f"H{head}" for head in range(matrix.shape[1])], fontsize=8)
    else:
        ax.set_xlabel("head")
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    if written:
        _write_cells(ax, matrix, norm, COLOURS, 7.5, short_number)
    if colorbar:
        ax.figure.colorbar(ScalarMappable(norm, COLOURS), ax=ax, fraction=0.05, pad=0.02).ax.tick_params(labelsize=7)
    _set_title(ax, title)
    return ax


def animate_head(
    patterns: Any,
    steps: Sequence[Any],
    tokens: Sequence[str] | None = None,
    key_tokens: Sequence[str] | None = None,
    *,
    title: str = "",
    vmax: float | None = 1.0,
    interval: int = 400,
) -> FuncAnimation:
    """How the map of one head changes: ``animation.save("head.gif", writer="pillow")``.

    Args:
        patterns: (N, Q, K) weights, one map for each frame.
        steps: (N,) numbers that are written above the frames.
        title: above every frame, before the step.
        interval: milliseconds that a frame stays.

    The others are those of ``plot_head``.
    """
    maps, steps = _array(patterns, "patterns", "(N, Q, K)"), list(steps)
    if len(steps) != len(maps) or not len(maps):
        raise AttentionMonitorError(
            f"There must be a step for each of one or more maps, got {len(steps)}, {len(maps)}."
        )

    def heading(frame: int) -> str:
        return f"{title}  step {steps[frame]}".strip()

    norm = _weight_norm(maps, vmax)
    ax = _map(maps[0], tokens, key_tokens, None, heading(0), norm, COLOURS, False, "weight")
    figure, [image] = ax.get_figure(), ax.get_images()
    assert isinstance(figure, Figure)

    def draw(frame: int) -> tuple[Any, ...]:
        image.set_data(maps[frame])
        ax.title.set_text(heading(frame))
        return image, ax.title

    return FuncAnimation(figure, draw, frames=len(maps), interval=interval, blit=False)


def _array(x: Any, name: str, *shapes: str) -> np.ndarray:
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


def _difference(before: Any, after: Any, shape: str) -> np.ndarray:
    a, b = _array(before, "before", shape), _array(after, "after", shape)
    if a.shape != b.shape:
        raise AttentionMonitorError(f"Maps of one shape can be compared, got {a.shape} before and {b.shape} after.")
    with np.errstate(invalid="ignore"):  # of infinities
        return b - a


def _weight_norm(maps: Sequence[np.ndarray] | np.ndarray, vmax: float | None) -> Normalize:
    return PowerNorm(0.5, 0, _checked_vmax(maps, vmax))


def _difference_norm(maps: Sequence[np.ndarray], vmax: float | None) -> Normalize:
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


def _checked_labels(labels: Sequence[Any] | None, n: int, name: str, of: str) -> list[str] | None:
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
    return _checked_labels(tokens, Q, "tokens", "queries"), _checked_labels(key_tokens, K, "key_tokens", "keys")


def _new_axes(width: float, height: float) -> Axes:
    return Figure(figsize=(width, height), layout="constrained").subplots()


def _map(
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
    _set_title(ax, title)
    if written:
        _write_cells(ax, weights, norm, colours, 6.5, lambda value: f"{value:.2f}" if value else "")  # 0: masked
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
    return 0.1 + 0.075 * max((len(readable(label)) for label in labels), default=0)


def _set_title(ax: Axes, title: str | None) -> None:
    if title:
        ax.set_title(drawable(title), parse_math=False, fontsize=10, fontfamily=font_families(title))


def _label(ax: Axes, queries: list[str] | None, keys: list[str] | None, fontsize: float) -> None:
    """Labels of positions; numbers where there are none or too many."""
    for axis, labels, rotation in ((ax.yaxis, queries, 0), (ax.xaxis, keys, 90)):
        if labels is not None and len(labels) <= MAX_LABELS:
            texts = [readable(label) for label in labels]
            families = font_families(texts)
            axis.set_ticks(
                range(len(texts)), texts, fontsize=fontsize, rotation=rotation, parse_math=False, fontfamily=families
            )
        else:
            axis.set_major_locator(MaxNLocator(integer=True))
            axis.set_tick_params(labelsize=fontsize)
        axis.set_tick_params(length=0 if labels is not None and len(labels) <= MAX_LABELS else 2, pad=2)


def _write_cells(ax: Axes, values: np.ndarray, norm: Normalize, colours: Colormap, fontsize: float, form: Any) -> None:
    """Numbers into the cells, white on dark colours; NaN is left out."""
    shades = colours(norm(np.ma.masked_invalid(values)))[..., :3] @ (0.299, 0.587, 0.114)
    for (row, column), value in np.ndenumerate(values):
        if not np.isnan(value):
            colour = "white" if shades[row, column] < 0.5 else "black"
            ax.text(column, row, form(value), ha="center", va="center", fontsize=fontsize, color=colour)


def _page(
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
    names = _checked_labels(names, len(maps), "names", "maps") or []
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
        name = drawable(name)
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
        figure.text(*place, drawable(title), fontsize=11, va="center", parse_math=False, fontfamily=families)
    return figure
