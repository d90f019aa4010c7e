"""What is found in a model, drawn: files of pictures by name, each drawn when it is asked for."""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any

from matplotlib.animation import FuncAnimation
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from attention_monitor import AttentionMaps
from attention_monitor.analysis import attention_flow
from attention_monitor.naming import head_heading, head_name, layer_name
from attention_monitor.plots.drawing import bounds_of
from attention_monitor.plots.figures import (
    animate_head,
    plot_differences,
    plot_head,
    plot_heads,
    plot_layers,
)
from attention_monitor.plots.repainted import RepaintedMap
from attention_monitor.plots.values import plot_flow, plot_matrix
from attention_monitor.probes.layer_measures import rollout
from attention_monitor.statistics.registry import STATISTICS

from .report import Comparison, ModelReading, Selection

Picture = tuple[str, Callable[[], Figure | Image.Image]]  # name of its file, and what draws it


def pictures(found: ModelReading, selection: Selection, statistics: Sequence[str], vmax: float | None, whole: bool,
             of_layers: bool) -> list[Picture]:  # fmt: skip
    """Those of heads, of each layer with its heads, and over layers.

    Args:
        statistics: drawn as matrices of layers and heads.
        vmax: weight with the brightest colour; None: the largest of a picture.
        whole: draw the heads of a layer on one page too.
        of_layers: draw pictures of all layers too.
    """
    pattern = lru_cache(maxsize=1)(found.maps.pattern)  # of one layer at a time: heads of a layer come together
    paint = _painter_of_heads(found.maps, pattern, vmax)
    drawn: list[Picture] = []
    for layer, heads in selection:
        if whole:
            drawn.append((f"layer_{layer}_all_heads.png", partial(_heads, found.maps, pattern, layer, heads, vmax)))
        for head in heads:
            drawn.append((f"layer_{layer}_head_{head}.png", partial(paint, layer, head)))
    if of_layers:
        drawn += _over_layers(found, statistics, vmax)
    return drawn


def difference_pictures(comparison: Comparison, selection: Selection) -> list[Picture]:
    """How the maps of each layer have changed, on one scale, and how much each head has."""
    before, after = comparison.before.maps, comparison.after.maps
    differences = (after.pattern(layer) - before.pattern(layer) for layer, _ in selection)
    largest = max(float(difference.nan_to_num().abs().max()) for difference in differences)
    drawn: list[Picture] = []
    for layer, heads in selection:

        def draw(layer: int = layer, heads: Sequence[int] = heads) -> Figure:
            a, b = (maps.pattern(layer)[list(heads)] for maps in (before, after))
            title = f"{_layer_title(before, layer)}: after - before"
            names = [head_heading(head) for head in heads]
            return plot_differences(a, b, *before.tokens_of(layer), names=names, title=title, vmax=largest or 1)

        drawn.append((f"layer_{layer}_difference.png", draw))
    drawn.append(("changes.png", lambda: _matrix(before, comparison.moved, "share of weight that moved", "0..1")))
    return drawn


def animation(
    maps: Sequence[AttentionMaps], steps: Sequence[int], layer: int, head: int, vmax: float | None
) -> FuncAnimation:
    """One head over the checkpoints of a run."""
    patterns = [of_step.pattern(layer)[head].numpy() for of_step in maps]
    return animate_head(patterns, steps, *maps[0].tokens_of(layer), title=_head_title(maps[0], layer, head), vmax=vmax)


def _layer_title(maps: AttentionMaps, layer: int) -> str:
    """Name a layer by its number, as ``--layer`` takes it, and by its path where a number says too little."""
    return f"{layer_name(layer)}{_path(maps, layer)}"


def _head_title(maps: AttentionMaps, layer: int, head: int) -> str:
    return f"{head_name(layer, head)}{_path(maps, layer)}"


def _path(maps: AttentionMaps, layer: int) -> str:
    """Return the path of a layer that is not of one plain stack, set off by a space."""
    label = maps.labels[layer]
    return "" if label[1:].isdigit() else f" {label}"


def _painter_of_heads(
    maps: AttentionMaps, pattern: Callable[[int], Tensor], vmax: float | None
) -> Callable[[int, int], Figure | Image.Image]:
    """Return what draws the map of a head; where it can, it repaints the picture of the layer's head before."""

    @lru_cache(maxsize=1)
    def repainted(layer: int) -> RepaintedMap:
        shape, title = pattern(layer)[0].shape, _head_title(maps, layer, 0)
        return RepaintedMap(shape, *maps.tokens_of(layer), title=title, vmax=vmax or 1.0)

    def paint(layer: int, head: int) -> Figure | Image.Image:
        weights, title = pattern(layer)[head], _head_title(maps, layer, head)
        if RepaintedMap.can_draw(weights.shape, vmax):
            return Image.fromarray(repainted(layer).draw(weights, title))
        return _figure(plot_head(weights, *maps.tokens_of(layer), title=title, vmax=vmax))

    return paint


def _heads(maps: AttentionMaps, pattern: Any, layer: int, heads: Sequence[int], vmax: float | None) -> Figure:
    n = maps.n_heads(layer)
    title = f"{_layer_title(maps, layer)}: {'all heads' if len(heads) == n else f'{len(heads)} of {n} heads'}"
    names = [head_heading(head) for head in heads]
    return plot_heads(pattern(layer)[list(heads)], *maps.tokens_of(layer), names=names, title=title, vmax=vmax)


def _over_layers(found: ModelReading, statistics: Sequence[str], vmax: float | None) -> Iterator[Picture]:
    maps, values = found.maps, found.snapshot
    shares = attention_flow(values)
    stacks = list(dict.fromkeys(maps.stacks))
    for i, stack in enumerate(stacks):
        layers = [layer for layer, of in enumerate(maps.stacks) if of == stack]
        suffix, of_stack = ("", "") if len(stacks) == 1 else (f"_{i}", f": {stack}")
        names, labels = [layer_name(layer) for layer in layers], maps.tokens_of(layers[0])

        def averaged(layers: Any = layers, names: Any = names, labels: Any = labels, of: str = of_stack) -> Figure:
            means = [maps.pattern(layer).mean(0) for layer in layers]
            return plot_layers(means, *labels, names=names, title=f"mean over the heads of each layer{of}", vmax=vmax)

        yield f"layers_averaged{suffix}.png", averaged
        if values.is_cross[layers[0]]:
            continue

        def flowing(layers: Any = layers, names: Any = names, of: str = of_stack) -> Figure:
            lines = {what: [share[layer] for layer in layers] for what, share in shares.items()}
            return _figure(plot_flow(lines, names, title=f"where attention goes{of}"))

        yield f"attention_flow{suffix}.png", flowing
        if len({size for layer in layers for size in maps.calls[layer].shape[2:]}) == 1:  # all are T x T

            def rolled(layers: Any = layers, labels: Any = labels, of: str = of_stack) -> Figure:
                last = rollout([maps.pattern(layer) for layer in layers])[-1]
                return _figure(plot_head(last, *labels, title=f"attention rollout over the layers{of}", vmax=None))

            yield f"rollout{suffix}.png", rolled
    for name in statistics:
        rows = [of_layer[name] for of_layer in values.values]
        title = f"{name} ({STATISTICS[name].unit})"
        yield f"matrix_{name}.png", partial(_matrix, maps, rows, title, STATISTICS[name].range)


def _matrix(maps: AttentionMaps, rows: Sequence[Any], title: str, value_range: str) -> Figure:
    names = [_layer_title(maps, layer) for layer in range(len(maps))]
    low, high = bounds_of(value_range)
    return _figure(plot_matrix(rows, names, title=title, vmin=low, vmax=high))


def _figure(ax: Any) -> Figure:
    assert isinstance(ax.figure, Figure)  # the toolkit made it, and not a part of one
    return ax.figure
