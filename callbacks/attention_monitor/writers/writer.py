"""Snapshots -> loggers, behind training.

Drawing and encoding happen on one background thread; what is given to it is drawn in order, and nothing is dropped:
a caller that is too far ahead waits.
"""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from ..errors import Once
from ..snapshots import Snapshot
from . import tags
from .sinks import Sink

# Snapshots that wait to be drawn: enough to even out a slow disk, few enough to bound memory.
MAX_PENDING = 4


class Writer:
    """Writes snapshots to sinks.

    Args:
        sinks: sinks to write to.
    """

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self.sinks = list(sinks)
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="attention-monitor")
        self._pending: deque[Future[None]] = deque()
        self._failures: deque[str] = deque()
        self._later: deque[tuple[Callable[..., None], Any]] = deque()  # calls of sinks that are not for threads
        self._once = Once()
        self._figures: dict[str, tuple[Any, Any]] = {}
        self._layout: dict[str, dict[str, list[str]]] = {}

    def write(self, snapshot: Snapshot) -> None:
        """Write what the snapshot has: scalars and matrices of values, a mosaic of patterns."""
        if not self.sinks:
            return
        values = tags.scalar_values(snapshot)
        for sink in self.sinks:
            if values and not sink.in_background:
                self._attempt(sink.scalars, values, snapshot.step)
        while len(self._pending) >= MAX_PENDING:
            self._pending.popleft().result()
        self._pending.append(self._executor.submit(self._write_in_background, snapshot, values))
        self._report()

    def write_text(self, tag: str, markdown: str, step: int) -> None:
        """Write a text, after what is waiting to be written."""
        if self.sinks:
            self._pending.append(self._executor.submit(self._write_text, tag, markdown, step))

    def _write_text(self, tag: str, markdown: str, step: int) -> None:
        for sink in self.sinks:
            self._call(sink, sink.text, tag, markdown, step)

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
        """Return what ``work`` returns; None if it fails, which is kept to be reported."""
        try:
            return work(*args)
        except Exception as error:
            self._failures.append(f"{type(error).__name__}: {error}")

    def _call(self, sink: Sink, work: Callable[..., None], *args: Any) -> None:
        """Call a method of a sink on this thread if it may be, and on the caller's thread later if not."""
        if sink.in_background:
            self._attempt(work, *args)
        else:
            self._later.append((work, args))

    def _report(self) -> None:
        """Do what is not for the writer's thread, and warn of failures."""
        while self._later:
            work, args = self._later.popleft()
            self._attempt(work, *args)
        while self._failures:
            message = self._failures.popleft()
            self._once.warn("failure", message, f"AttentionMonitor could not write: {message}", stacklevel=3)

    def _write_in_background(self, snapshot: Snapshot, values: dict[str, float]) -> None:
        layout = self._layout | tags.custom_scalars_layout(snapshot)
        for sink in self.sinks:
            if values and sink.in_background:
                self._attempt(sink.scalars, values, snapshot.step)
            if layout != self._layout:  # the newest one counts, so that it has to have everything
                self._call(sink, sink.layout, layout)
        self._layout = layout
        takers = [sink for sink in self.sinks if sink.takes_images]
        for tag, pixels in ((takers and self._attempt(self._draw, snapshot)) or {}).items():
            for sink in takers:
                self._call(sink, sink.image, tag, pixels, snapshot.step)
        for sink in self.sinks:
            self._call(sink, sink.flush)

    def _draw(self, snapshot: Snapshot) -> dict[str, np.ndarray]:
        """Draw all pictures of a snapshot: tag -> pixels."""
        from ..plots.repainted import (  # matplotlib takes a second to load, and many runs draw nothing
            HeadMatrix,
            Mosaic,
        )

        images = {}
        maps = {record.label: record.pattern for record in snapshot.records if record.pattern is not None}
        rolled = {label: rollout[None] for label, rollout in snapshot.rollout.items()}
        for tag, patterns, title, are_heads in (
            (tags.of_maps(snapshot.source), maps, f"attention of every head: {snapshot.source}", True),
            (tags.of_rollout(snapshot.source), rolled, "attention rollout: what each token is made of", False),
        ):
            if patterns:
                shapes = [pattern.shape for pattern in patterns.values()]
                mosaic = self._figure(tag, Mosaic, shapes, list(patterns), snapshot.tokens, title, are_heads)
                images[tag] = mosaic.draw(list(patterns.values()))
        for name, column in tags.written_columns(snapshot).items():
            rows = {
                record.label: record.values[column.name]
                for record in snapshot.records
                if not (record.is_cross and column.self_attention_only)
            }
            if rows:
                tag, n_heads = tags.of_matrix(name), [len(heads) for heads in rows.values()]
                matrix = self._figure(tag, HeadMatrix, n_heads, list(rows), name, column.range)
                images[tag] = matrix.draw(list(rows.values()))
        return images

    def _figure(self, tag: str, make: Callable[..., Any], *layout: Any) -> Any:
        """Return the figure for a tag, made anew only when its layout has changed."""
        if tag not in self._figures or self._figures[tag][0] != layout:
            self._figures[tag] = (layout, make(*layout))
        return self._figures[tag][1]
