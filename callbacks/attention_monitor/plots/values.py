"""Numbers of heads -> matplotlib: a matrix of all heads, and lines over the layers.

Arrays and Axes are taken and given as in ``figures.py``.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from ..errors import AttentionMonitorError
from ..naming import layer_name
from .arrays import as_array, as_matrix, checked_labels
from .drawing import (
    COLOURS,
    TITLE_INCHES,
    add_colorbar,
    label_matrix,
    new_axes,
    set_title,
    short_number,
    show,
    value_norm,
    write_cells,
)

MAX_HEADS = 32  # heads of a layer that have a heading and a number each: half an inch each makes 16 inches
CHARACTER_INCHES = 0.09  # width of a character of a layer's name, 8 points


def plot_flow(
    flow: Mapping[str, Sequence[Any]],
    names: Sequence[str] | None = None,
    *,
    ax: Axes | None = None,
    title: str | None = None,
) -> Axes:
    """Draw where attention goes from layer to layer.

    Lines are means over heads; bands reach from the lowest head to the highest.

    Args:
        flow: what attention goes to -> for each layer the share of each head, (H,), or one number; NaN is left out.
        names: names of the layers; None: their numbers.
        ax: Axes to draw in; None: those of a new figure.
        title: title above the lines.

    Returns:
        The Axes that were drawn in.

    Raises:
        AttentionMonitorError: on lines with different numbers of layers, or labels of another number.

    Example:
        >>> from attention_monitor import plot_flow
        >>> ax = plot_flow({"itself": [[0.1, 0.3], [0.5, 0.7]], "earlier tokens": [0.8, 0.4]}, ["L00", "L01"])
        >>> [line.get_label() for line in ax.lines]
        ['itself', 'earlier tokens']
    """
    lines = {what: [as_array(x, what, "(H,)", "()").reshape(-1) for x in shares] for what, shares in flow.items()}
    if not lines or len({len(shares) for shares in lines.values()} | {0}) != 2:
        found = {what: len(shares) for what, shares in lines.items()}
        raise AttentionMonitorError(
            f"flow must have the same layers, one or more, for each line, got {found}; "
            "give every line a share for each layer, NaN where it is not known."
        )
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
        ax.plot(layers, mean, color=f"C{i}", marker="osD^v"[i % 5], label=what)  # told apart without colours too
        ax.fill_between(layers, low, high, color=f"C{i}", alpha=0.15, linewidth=0)
    ax.set(ylim=(-0.02, 1.02), xlabel="layer", ylabel="share of attention")
    long = max(map(len, names)) > 4  # than "L000"
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
    """Draw one number of every head: layers downwards, heads across.

    Args:
        values: (H,) values of each layer; layers may differ in their heads, and NaN is left out. A table of pandas is
            taken too.
        names: names of the layers; None: L00, L01, ...
        ax: Axes to draw in; None: those of a new figure.
        title: title above the matrix.
        vmin: value with the darkest colour; None: the smallest there is.
        vmax: value with the brightest colour; None: the largest there is.
        annotate: whether to write values into the cells; None: if a layer has at most 32 heads.
        colorbar: whether to draw a colour bar beside the matrix.

    Returns:
        The Axes that were drawn in.

    Raises:
        AttentionMonitorError: on values without a head, labels of another number, or bounds in the wrong order.

    Example:
        >>> from attention_monitor import plot_matrix
        >>> ax = plot_matrix([[0.5, 1.2], [0.1, 0.9]], title="entropy (nats)", vmin=0)
        >>> [label.get_text() for label in ax.get_yticklabels()], [text.get_text() for text in ax.texts]
        (['L00', 'L01'], ['0.50', '1.20', '0.10', '0.90'])
    """
    values = values.to_numpy() if hasattr(values, "to_numpy") else values  # a table of pandas is iterated by columns
    rows = [as_array(row, "a row of values", "(H,)") for row in values]
    if not rows or not max(map(len, rows)):
        raise AttentionMonitorError(
            "values must have a layer with a head, (L, H), got none; give a row of numbers for each layer."
        )
    if vmin is not None and vmax is not None and vmin > vmax:
        raise AttentionMonitorError(
            f"vmin must not be more than vmax, got {vmin} and {vmax}; swap them, or leave one out."
        )
    matrix = as_matrix(rows)
    n_layers, n_heads = matrix.shape
    names = checked_labels(names, n_layers, "names", "layers") or [layer_name(layer) for layer in range(n_layers)]
    written = n_heads <= MAX_HEADS if annotate is None else annotate
    if ax is None:
        cell = 0.5 if written else 0.2  # six characters of 7.5 points, or nothing but a colour
        label = CHARACTER_INCHES * max(map(len, names))
        width = max(3, n_heads * cell + label + 1.2, TITLE_INCHES * len(title or "") + 2 * label)
        ax = new_axes(width, max(1.5, n_layers * 0.3 + 0.9))
    norm = value_norm(matrix, vmin, vmax)
    show(ax, matrix, norm, COLOURS)
    label_matrix(ax, names, n_heads if n_heads <= MAX_HEADS else None)
    if written:
        write_cells(ax, matrix, norm, COLOURS, 7.5, short_number)
    if colorbar:
        add_colorbar(ax.figure, norm, COLOURS, ax=ax, fraction=0.05, pad=0.02)
    set_title(ax, title)
    return ax
