"""Patterns of heads -> matplotlib: maps for papers, notebooks and the command line.

Functions take arrays (numpy, or torch tensors on any device and in any dtype) and an optional ``Axes``, and return the
``Axes`` or ``Figure`` they drew in, in the habit of matplotlib and seaborn. Nothing is shown or saved, and pyplot is
not touched: save with ``axes.figure.savefig(path)``; a notebook shows ``axes.figure`` after ``%matplotlib inline``.

Shapes: L layers, H heads, Q queries, K keys. In a map queries go downwards and keys across; colour is the weight on a
square-root scale, so that diffuse rows can be told apart. Colours are safe for the colour-blind.
"""

from collections.abc import Sequence
from typing import Any

from matplotlib.animation import FuncAnimation
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..errors import AttentionMonitorError
from ..naming import head_heading, layer_name
from .arrays import as_array, difference_of
from .drawing import COLOURS, DIFFERENCES, difference_norm, weight_norm
from .maps import draw_map, draw_page


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
    """Draw the map of one head.

    Args:
        pattern: (Q, K) weights.
        tokens: labels of the queries, and of the keys too, if there are as many.
        key_tokens: labels of the keys, where they differ from those of the queries (cross-attention).
        ax: Axes to draw in; None: those of a new figure of a fitting size.
        title: title above the map.
        vmax: weight with the brightest colour; None: the largest there is.
        annotate: whether to write weights into the cells; None: if there are at most 12 x 12.
        colorbar: whether to draw a colour bar beside the map.

    Returns:
        The Axes that were drawn in.

    Raises:
        AttentionMonitorError: on an array of another shape, or labels of another number.

    Example:
        >>> from attention_monitor import plot_head
        >>> ax = plot_head([[1, 0], [0.25, 0.75]], ["The", " cat"], title="L03H05")
        >>> [label.get_text() for label in ax.get_yticklabels()], [text.get_text() for text in ax.texts]
        (['The', '·cat'], ['1.00', '', '0.25', '0.75'])
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
    """Draw how the map of one head has changed, after - before, on a diverging scale with 0 in its middle.

    Args:
        before: (Q, K) weights.
        after: (Q, K) weights.
        vmax: difference with the strongest colour; None: the largest there is.

    The other arguments are those of ``plot_head``.

    Returns:
        The Axes that were drawn in.

    Raises:
        AttentionMonitorError: on arrays of other or different shapes, or labels of another number.

    Example:
        >>> from attention_monitor import plot_difference
        >>> ax = plot_difference([[1, 0], [0.7, 0.3]], [[1, 0], [0.1, 0.9]], ["The", " cat"])
        >>> [text.get_text() for text in ax.texts]
        ['', '', '-0.60', '0.60']
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
    """Draw the maps of several heads, side by side, with one colour scale.

    Args:
        patterns: (H, Q, K) weights.
        tokens: labels of the queries, and of the keys too, if there are as many; left out where there is no room.
        key_tokens: labels of the keys, where they differ from those of the queries.
        names: names of the heads; None: H0, H1, ...
        title: title of the page.
        vmax: weight with the brightest colour; None: the largest there is.

    Returns:
        A new figure.

    Raises:
        AttentionMonitorError: on an array of another shape, or labels of another number.

    Example:
        >>> import numpy as np
        >>> from attention_monitor import plot_heads
        >>> figure = plot_heads(np.full((2, 3, 3), 1 / 3), ["The", " cat", " sat"], title="L03")
        >>> [ax.get_title() for ax in figure.axes[:2]]
        ['H0', 'H1']
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
    """Draw how the maps of several heads have changed, side by side, with one colour scale.

    Args:
        before: (H, Q, K) weights.
        after: (H, Q, K) weights.
        vmax: difference with the strongest colour; None: the largest there is.

    The other arguments are those of ``plot_heads``.

    Returns:
        A new figure.

    Raises:
        AttentionMonitorError: on arrays of other or different shapes, or labels of another number.

    Example:
        >>> import numpy as np
        >>> from attention_monitor import plot_differences
        >>> figure = plot_differences(np.zeros((2, 3, 3)), np.full((2, 3, 3), 0.25), names=["H1", "H4"])
        >>> figure.axes[0].images[0].get_clim()
        (-0.25, 0.25)
    """
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
    """Draw a map for each layer, averaged over its heads.

    Args:
        patterns: weights of each layer, (H, Q, K), which are averaged over H, or (Q, K); layers may differ in shape.
        names: names of the layers; None: L00, L01, ...

    The other arguments are those of ``plot_heads``.

    Returns:
        A new figure.

    Raises:
        AttentionMonitorError: on arrays of other shapes, or labels of another number.

    Example:
        >>> import numpy as np
        >>> from attention_monitor import plot_layers
        >>> figure = plot_layers([np.full((4, 3, 3), 1 / 3), np.eye(3)], ["The", " cat", " sat"])
        >>> [ax.get_title() for ax in figure.axes[:2]]
        ['L00', 'L01']
    """
    maps = []
    for layer in patterns:
        weights = as_array(layer, "a layer's pattern", "(H, Q, K)", "(Q, K)")
        maps.append(weights.mean(0) if weights.ndim == 3 else weights)
    names = [layer_name(layer) for layer in range(len(maps))] if names is None else names
    return draw_page(maps, names, tokens, key_tokens, title, weight_norm(maps, vmax), COLOURS, "weight")


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
    """Animate how the map of one head changes.

    Args:
        patterns: (N, Q, K) weights, one map for each frame.
        steps: (N,) numbers to write above the frames.
        title: title above every frame, before the step.
        interval: milliseconds that a frame stays.

    The other arguments are those of ``plot_head``.

    Returns:
        An animation; ``animation.save("head.gif", writer="pillow")`` writes it to a file.

    Raises:
        AttentionMonitorError: on an array of another shape, and on another number of steps or labels.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from attention_monitor import animate_head
        >>> animation = animate_head([np.full((2, 2), 0.5), np.eye(2)], [0, 100], title="L03H05")
        >>> with tempfile.NamedTemporaryFile(suffix=".gif") as file:
        ...     animation.save(file.name, writer="pillow")
    """
    maps, steps = as_array(patterns, "patterns", "(N, Q, K)"), list(steps)
    if len(steps) != len(maps) or not len(maps):
        raise AttentionMonitorError(
            f"There must be a step for each of one or more maps, got {len(steps)}, {len(maps)} (steps, maps); "
            "give as many steps as maps."
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
