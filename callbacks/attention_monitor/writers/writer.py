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

import warnings
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from ..snapshots import Snapshot
from .sinks import Sink
from .tags import Column, columns_of, custom_scalars_layout, scalar_values

MAX_PENDING = 4  # snapshots waiting to be drawn


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
        from ..plots.repainted import HeadMatrix, Mosaic

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
