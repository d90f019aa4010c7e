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
from matplotlib.animation import FuncAnimation
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from ..errors import AttentionMonitorError
from ..naming import head_heading, layer_name
from .drawing import (
    COLOURS,
    DIFFERENCES,
    TITLE_INCHES,
    as_array,
    checked_labels,
    difference_norm,
    difference_of,
    draw_map,
    draw_page,
    new_axes,
    set_title,
    short_number,
    weight_norm,
    write_cells,
)
from .fonts import font_families, with_known_glyphs


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
    weights = as_array(pattern, "pattern", "(Q, K)")
    norm = weight_norm([weights], vmax)
    return draw_map(weights, tokens, key_tokens, ax, title, norm, COLOURS, annotate, "weight" if colorbar else None)


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
    difference = difference_of(before, after, "(Q, K)")
    norm = difference_norm([difference], vmax)
    label = "difference of weights" if colorbar else None
    return draw_map(difference, tokens, key_tokens, ax, title, norm, DIFFERENCES, annotate, label)


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
    maps = list(as_array(patterns, "patterns", "(H, Q, K)"))
    names = [head_heading(head) for head in range(len(maps))] if names is None else names
    return draw_page(maps, names, tokens, key_tokens, title, weight_norm(maps, vmax), COLOURS, "weight")


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
    maps = list(difference_of(before, after, "(H, Q, K)"))
    names = [head_heading(head) for head in range(len(maps))] if names is None else names
    norm = difference_norm(maps, vmax)
    return draw_page(maps, names, tokens, key_tokens, title, norm, DIFFERENCES, "difference of weights")


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
        names: of the layers; None: L00, L01, ...

    The others are those of ``plot_heads``.
    """
    maps = []
    for layer in patterns:
        weights = as_array(layer, "a layer's pattern", "(H, Q, K)", "(Q, K)")
        maps.append(weights.mean(0) if weights.ndim == 3 else weights)
    names = [layer_name(layer) for layer in range(len(maps))] if names is None else names
    return draw_page(maps, names, tokens, key_tokens, title, weight_norm(maps, vmax), COLOURS, "weight")


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
    lines = {what: [as_array(x, what, "(H,)", "()").reshape(-1) for x in shares] for what, shares in flow.items()}
    if not lines or len({len(shares) for shares in lines.values()} | {0}) != 2:
        found = {what: len(shares) for what, shares in lines.items()}
        raise AttentionMonitorError(f"flow must have the same layers, one or more, for each line, got {found}.")
    n_layers = len(next(iter(lines.values())))
    names = checked_labels(names, n_layers, "names", "layers") or [str(layer) for layer in range(n_layers)]
    if ax is None:
        ax = new_axes(max(4.5, min(16, 1.5 + 0.45 * n_layers), TITLE_INCHES * len(title or "")), 3.6)
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
    set_title(ax, title)
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
        names: of the layers; None: L00, L01, ...
        ax: where to draw; None: a new figure.
        vmin: value with the darkest colour; None: the smallest there is.
        vmax: value with the brightest colour; None: the largest there is.
        annotate: write values into the cells; None: if there are at most 32 heads.
        colorbar: draw one beside the matrix.
    """
    values = values.to_numpy() if hasattr(values, "to_numpy") else values  # a table of pandas is iterated by columns
    rows = [as_array(row, "a row of values", "(H,)") for row in values]
    if not rows or not max(map(len, rows)):
        raise AttentionMonitorError("values must have a layer with a head, (L, H), got none.")
    matrix = np.full((len(rows), max(map(len, rows))), np.nan)
    for layer, row in enumerate(rows):
        matrix[layer, : len(row)] = row
    names = checked_labels(names, len(rows), "names", "layers") or [layer_name(layer) for layer in range(len(rows))]
    written = matrix.shape[1] <= 32 if annotate is None else annotate
    if ax is None:
        cell = 0.5 if written else 0.2
        label = 0.09 * max(map(len, names))
        width = max(3, matrix.shape[1] * cell + label + 1.2, TITLE_INCHES * len(title or "") + 2 * label)
        ax = new_axes(width, max(1.5, matrix.shape[0] * 0.3 + 0.9))
    if vmin is not None and vmax is not None and vmin > vmax:
        raise AttentionMonitorError(f"vmin must not be more than vmax, got {vmin} and {vmax}.")
    norm = Normalize(vmin, vmax)
    finite = matrix[np.isfinite(matrix)]
    norm.autoscale_None(finite if len(finite) else np.zeros(1))
    ax.imshow(matrix, cmap=COLOURS, norm=norm, aspect="auto", interpolation="nearest")
    names = [with_known_glyphs(name) for name in names]
    ax.set_yticks(range(len(rows)), names, parse_math=False, fontsize=8, fontfamily=font_families(names))
    if matrix.shape[1] <= 32:
        ax.set_xticks(range(matrix.shape[1]), [head_heading(head) for head in range(matrix.shape[1])], fontsize=8)
    else:
        ax.set_xlabel("head")
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    if written:
        write_cells(ax, matrix, norm, COLOURS, 7.5, short_number)
    if colorbar:
        ax.figure.colorbar(ScalarMappable(norm, COLOURS), ax=ax, fraction=0.05, pad=0.02).ax.tick_params(labelsize=7)
    set_title(ax, title)
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
    maps, steps = as_array(patterns, "patterns", "(N, Q, K)"), list(steps)
    if len(steps) != len(maps) or not len(maps):
        raise AttentionMonitorError(
            f"There must be a step for each of one or more maps, got {len(steps)}, {len(maps)}."
        )

    def heading(frame: int) -> str:
        return f"{title}  step {steps[frame]}".strip()

    norm = weight_norm(maps, vmax)
    ax = draw_map(maps[0], tokens, key_tokens, None, heading(0), norm, COLOURS, False, "weight")
    figure, [image] = ax.get_figure(), ax.get_images()
    assert isinstance(figure, Figure)

    def draw(frame: int) -> tuple[Any, ...]:
        image.set_data(maps[frame])
        ax.title.set_text(heading(frame))
        return image, ax.title

    return FuncAnimation(figure, draw, frames=len(maps), interval=interval, blit=False)
