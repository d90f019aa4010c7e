"""Snapshots -> loggers. The only module that knows tags.

    attention_{statistic}/L00H03     one head
    attention_{statistic}/mean       mean over heads; of each stack of layers, where there are several, mean/{stack}
    attention_heads/{statistic}      layer x head matrix
    attention_maps/{source}          every map in one picture
    attention_{probe}_{score}/...    what a probe scores heads by, likewise
    attention_{probe}_{name}/L00     one layer; attention_rollout/{probe} a picture
    attention_roles                  which heads have a role, and since when

Drawing and encoding happen on one background thread; what is given to it is drawn in order, and nothing is dropped:
a caller that is too far ahead waits.
"""

import io
import math
import re
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from os import PathLike
from typing import Any, Protocol

import numpy as np
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary

from .errors import AttentionMonitorError
from .naming import head_name
from .snapshots import Snapshot
from .statistics.registry import STATISTICS

MAX_PENDING = 4  # snapshots waiting to be drawn


class Sink(Protocol):
    """Where a writer writes to.

    Attributes:
        in_background: scalars may be written from the writer's thread.
        takes_images: pictures are worth drawing.
    """

    in_background: bool
    takes_images: bool

    def scalars(self, values: dict[str, float], step: int) -> None: ...

    def image(self, tag: str, pixels: np.ndarray, step: int) -> None: ...

    def text(self, tag: str, markdown: str, step: int) -> None: ...

    def layout(self, layout: dict[str, dict[str, list[str]]]) -> None: ...

    def flush(self) -> None: ...


class TensorBoardSink:
    """Writes to a ``torch.utils.tensorboard.SummaryWriter``.

    In one event for hundreds of heads: ``add_scalar`` writes one for each, and ``add_image`` converts the pixels twice.
    """

    in_background = True
    takes_images = True

    def __init__(self, experiment: Any) -> None:
        self.experiment = experiment

    def scalars(self, values: dict[str, float], step: int) -> None:
        self._add([Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()], step)

    def image(self, tag: str, pixels: np.ndarray, step: int) -> None:
        height, width, channels = pixels.shape
        png = io.BytesIO()
        Image.fromarray(pixels).save(png, "PNG", compress_level=1)  # the default takes three times as long
        image = Summary.Image(height=height, width=width, colorspace=channels, encoded_image_string=png.getvalue())
        self._add([Summary.Value(tag=tag, image=image)], step)

    def text(self, tag: str, markdown: str, step: int) -> None:
        self.experiment.add_text(tag, markdown, step)

    def _add(self, values: list[Any], step: int) -> None:
        self.experiment.file_writer.add_summary(Summary(value=values), step)

    def layout(self, layout: dict[str, dict[str, list[str]]]) -> None:
        charts = {
            category: {name: ["Multiline", tags] for name, tags in lines.items()} for category, lines in layout.items()
        }
        self.experiment.add_custom_scalars(charts)

    def flush(self) -> None:
        self.experiment.flush()


class LoggerSink:
    """Writes to any Lightning logger: scalars through ``log_metrics``, pictures where it has ``log_image``."""

    in_background = False  # loggers are not made for threads

    def __init__(self, logger: Any) -> None:
        self.logger = logger
        self.takes_images = hasattr(logger, "log_image")

    def scalars(self, values: dict[str, float], step: int) -> None:
        self.logger.log_metrics(values, step=step)

    def image(self, tag: str, pixels: np.ndarray, step: int) -> None:
        self.logger.log_image(key=tag, images=[pixels], step=step)

    def text(self, tag: str, markdown: str, step: int) -> None:
        pass  # each has its own idea of a text

    def layout(self, layout: dict[str, dict[str, list[str]]]) -> None:
        pass  # only TensorBoard has it

    def flush(self) -> None:
        pass


def sinks_for(log_to: Any) -> list[Sink]:
    """Sinks for a folder, a SummaryWriter, a Lightning logger, or a list of these; none for None.

    Raises:
        AttentionMonitorError: on anything else.
    """
    if isinstance(log_to, list | tuple):
        return [sink for one in log_to for sink in sinks_for(one)]
    if log_to is None:
        return []
    if isinstance(log_to, str | PathLike) and str(log_to):
        from torch.utils.tensorboard import SummaryWriter

        return [TensorBoardSink(SummaryWriter(log_to))]
    for experiment in (log_to, getattr(log_to, "experiment", None)):
        if hasattr(getattr(experiment, "file_writer", None), "add_summary"):
            return [TensorBoardSink(experiment)]
    if not hasattr(log_to, "log_metrics"):
        raise AttentionMonitorError(
            f"Nothing can be logged to {log_to!r}: give a folder, a SummaryWriter, a Lightning logger, or a list."
        )
    return [LoggerSink(log_to)]


class Writer:
    """Writes snapshots to sinks.

    Args:
        sinks: where to.
        statistics: names of those that are written of the live batch; of a probe, all are.
    """

    def __init__(self, sinks: Sequence[Sink], statistics: Sequence[str]) -> None:
        self.sinks, self.statistics = list(sinks), list(statistics)
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="attention-monitor")
        self._pending: deque[Future[None]] = deque()
        self._failures: deque[str] = deque()
        self._drawn: deque[tuple[Sink, str, np.ndarray, int]] = deque()  # for sinks that are not for threads
        self._reported: set[str] = set()
        self._figures: dict[str, tuple[Any, Any]] = {}
        self._layout: dict[str, dict[str, list[str]]] = {}

    def write(self, snapshot: Snapshot) -> None:
        """Write what the snapshot has: scalars and matrices of values, a mosaic of patterns."""
        if not self.sinks:
            return
        columns = columns_of(snapshot, self.statistics)
        values = scalar_values(snapshot, columns)
        for sink in self.sinks:
            if values and not sink.in_background:
                self._attempt(sink.scalars, values, snapshot.step)
        while len(self._pending) >= MAX_PENDING:
            self._pending.popleft().result()
        self._pending.append(self._executor.submit(self._write_in_background, snapshot, columns, values))
        self._report()

    def write_text(self, tag: str, markdown: str, step: int) -> None:
        """Write a text, after what is waiting to be written."""
        if self.sinks:
            self._pending.append(self._executor.submit(self._write_text, tag, markdown, step))

    def _write_text(self, tag: str, markdown: str, step: int) -> None:
        for sink in self.sinks:
            self._attempt(sink.text, tag, markdown, step)

    def flush(self) -> None:
        """Wait until everything is written; failures are warned about."""
        while self._pending:
            self._pending.popleft().result()
        self._report()

    def close(self) -> None:
        """Flush and end the thread."""
        self.flush()
        self._executor.shutdown()

    def _attempt(self, work: Callable[..., Any], *args: Any) -> Any:
        """What ``work`` returns; None if it fails, which is kept to be reported."""
        try:
            return work(*args)
        except Exception as error:
            self._failures.append(f"{type(error).__name__}: {error}")

    def _report(self) -> None:
        """On the caller's thread: hand on what was drawn, and warn about failures that have not been warned about."""
        while self._drawn:
            sink, *image = self._drawn.popleft()
            self._attempt(sink.image, *image)
        while self._failures:
            message = self._failures.popleft()
            if message not in self._reported:  # say it once, not at every step
                self._reported.add(message)
                warnings.warn(f"AttentionMonitor could not write: {message}", stacklevel=3)

    def _write_in_background(self, snapshot: Snapshot, columns: "dict[str, Column]", values: dict[str, float]) -> None:
        layout = self._layout | custom_scalars_layout(snapshot, columns)
        for sink in self.sinks:
            if values and sink.in_background:
                self._attempt(sink.scalars, values, snapshot.step)
            if layout != self._layout:  # the newest one counts, so that it has to have everything
                self._attempt(sink.layout, layout)
        self._layout = layout
        takers = [sink for sink in self.sinks if sink.takes_images]
        for tag, pixels in ((takers and self._attempt(self._draw, snapshot, columns)) or {}).items():
            for sink in takers:
                if sink.in_background:
                    self._attempt(sink.image, tag, pixels, snapshot.step)
                else:
                    self._drawn.append((sink, tag, pixels, snapshot.step))
        for sink in self.sinks:
            self._attempt(sink.flush)

    def _draw(self, snapshot: Snapshot, columns: "dict[str, Column]") -> dict[str, np.ndarray]:
        from .plots.repainted import HeadMatrix, Mosaic

        images = {}
        if snapshot.patterns:
            maps = [pattern.numpy() for pattern in snapshot.patterns]
            tag, title = f"attention_maps/{snapshot.source}", f"attention of every head: {snapshot.source}"
            mosaic = self._figure(tag, Mosaic, [m.shape for m in maps], snapshot.labels, snapshot.tokens, title)
            images[tag] = mosaic.draw(maps)
        if snapshot.rollout:
            tag, title = f"attention_rollout/{snapshot.source}", "attention rollout: what each token is made of"
            maps = [rolled[None].numpy() for rolled in snapshot.rollout.values()]
            labels = list(snapshot.rollout)
            mosaic = self._figure(tag, Mosaic, [m.shape for m in maps], labels, snapshot.tokens, title, False)
            images[tag] = mosaic.draw(maps)
        is_cross = snapshot.is_cross or [False] * len(snapshot.values)
        for name, column in columns.items():
            rows = [i for i, cross in enumerate(is_cross) if not (cross and column.self_attention_only)]
            heads = [snapshot.values[i][column.value].numpy() for i in rows]
            if not heads:
                continue
            tag, labels = f"attention_heads/{name}", [snapshot.labels[i] for i in rows]
            matrix = self._figure(tag, HeadMatrix, [len(h) for h in heads], labels, name, column.range)
            images[tag] = matrix.draw(heads)
        return images

    def _figure(self, tag: str, make: Callable[..., Any], *layout: Any) -> Any:
        """The figure for a tag, made anew only when its layout has changed."""
        if tag not in self._figures or self._figures[tag][0] != layout:
            self._figures[tag] = (layout, make(*layout))
        return self._figures[tag][1]


@dataclass(frozen=True)
class Column:
    """Values that are written under one tag.

    Attributes:
        value: name in a snapshot's values.
        range: of the values.
        self_attention_only: there are none for cross-attention.
    """

    value: str
    range: str
    self_attention_only: bool


def columns_of(snapshot: Snapshot, statistics: Sequence[str]) -> dict[str, Column]:
    """What is written of a snapshot, by its name in tags."""
    if not any(snapshot.values):
        return {}
    live = snapshot.source == "live"
    prefix, written = ("", statistics) if live else (f"{snapshot.source}_", list(snapshot.values[0]))
    scores = {score.name: score for score in snapshot.scores}
    columns = {}
    for name in written:
        if name not in scores:
            columns[prefix + name] = Column(name, STATISTICS[name].range, STATISTICS[name].self_attention_only)
        elif scores[name].is_written:
            columns[prefix + name] = Column(name, "0..1", True)
    return columns


def scalar_values(snapshot: Snapshot, columns: dict[str, Column]) -> dict[str, float]:
    """tag -> value of every head, the mean over heads and over those of each stack; NaN is left out."""
    tagged = {}
    for name, column in columns.items():
        for label, values in zip(snapshot.labels, snapshot.values, strict=True):
            for head, value in enumerate(values[column.value].tolist()):
                tagged[f"attention_{name}/{head_name(label, head)}"] = value
        tagged[f"attention_{name}/mean"] = snapshot.mean(column.value)
        stacks = list(dict.fromkeys(snapshot.stacks))
        if len(stacks) > 1:
            tagged |= {f"attention_{name}/mean/{stack}": snapshot.mean(column.value, stack) for stack in stacks}
    for name, numbers in snapshot.layers.items():
        labelled = zip(snapshot.labels, numbers, strict=True)
        tagged |= {f"attention_{snapshot.source}_{name}/{label}": number for label, number in labelled}
    return {tag: value for tag, value in tagged.items() if not math.isnan(value)}


def custom_scalars_layout(snapshot: Snapshot, columns: dict[str, Column]) -> dict[str, dict[str, list[str]]]:
    """For TensorBoard's Custom Scalars tab: name -> layer -> the tags of its heads, as regular expressions."""

    def tag(name: str, label: str, head: int) -> str:
        return f"^{re.escape(f'attention_{name}/{head_name(label, head)}')}$"

    return {
        name: {
            label: [tag(name, label, head) for head in range(len(values[column.value]))]
            for label, values in zip(snapshot.labels, snapshot.values, strict=True)
        }
        for name, column in columns.items()
    }
