"""Where a writer writes to: one class for each kind of logger."""

import io
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary

from ..errors import AttentionMonitorError


class Sink(ABC):
    """Somewhere to write to. Subclasses register themselves; the newest is asked first what it writes to.

    Attributes:
        in_background: whether its methods may be called on the writer's thread; False: on that of training alone.
        takes_images: whether pictures are worth drawing.

    Example:
        >>> class Memory:
        ...     seen = {}
        >>> class MemorySink(Sink):
        ...     @classmethod
        ...     def for_logger(cls, logger):
        ...         return cls() if isinstance(logger, Memory) else None
        ...
        ...     def scalars(self, values, step):
        ...         Memory.seen[step] = values
        >>> sinks_for([Memory()])[0].scalars({"attention_entropy/mean": 1.5}, 0)
        >>> Memory.seen
        {0: {'attention_entropy/mean': 1.5}}
        >>> SINKS.remove(MemorySink)
    """

    in_background: bool = False  # most loggers are not made for threads
    takes_images: bool = False

    def __init_subclass__(cls) -> None:
        SINKS.insert(0, cls)

    @classmethod
    @abstractmethod
    def for_logger(cls, logger: Any) -> "Sink | None":
        """Make a sink that writes to a logger; None for a logger of another kind."""

    @abstractmethod
    def scalars(self, values: dict[str, float], step: int) -> None:
        """Write numbers by their tags."""

    def image(self, tag: str, pixels: np.ndarray, step: int) -> None:  # noqa: B027 - writes nothing unless overridden
        """Write a picture, (height, width, 3) uint8."""

    def text(self, tag: str, markdown: str, step: int) -> None:  # noqa: B027 - writes nothing unless overridden
        """Write a text in Markdown."""

    def layout(self, layout: dict[str, dict[str, list[str]]]) -> None:  # noqa: B027 - writes nothing unless overridden
        """Write which curves share a chart: name -> layer -> regular expressions for tags."""

    def flush(self) -> None:  # noqa: B027 - writes nothing unless overridden
        """Have everything on disk."""


SINKS: list[type[Sink]] = []


class LoggerSink(Sink):
    """Writes to any Lightning logger: scalars through ``log_metrics``, pictures where it has ``log_image``.

    Texts and layouts are left out: each logger has its own idea of a text.
    """

    def __init__(self, logger: Any) -> None:
        self.logger = logger
        self.takes_images = hasattr(logger, "log_image")

    @classmethod
    def for_logger(cls, logger: Any) -> "LoggerSink | None":
        return cls(logger) if hasattr(logger, "log_metrics") else None

    def scalars(self, values: dict[str, float], step: int) -> None:
        self.logger.log_metrics(values, step=step)

    def image(self, tag: str, pixels: np.ndarray, step: int) -> None:
        self.logger.log_image(key=tag, images=[pixels], step=step)


class TensorBoardSink(Sink):
    """Writes to a ``SummaryWriter`` of torch, or to a Lightning logger that has one.

    In one event for hundreds of heads: ``add_scalar`` writes one for each, and ``add_image`` converts the pixels twice.
    """

    in_background = True
    takes_images = True

    def __init__(self, experiment: Any) -> None:
        self.experiment = experiment

    @classmethod
    def for_logger(cls, logger: Any) -> "TensorBoardSink | None":
        for experiment in (logger, getattr(logger, "experiment", None)):
            if hasattr(getattr(experiment, "file_writer", None), "add_summary"):
                return cls(experiment)
        return None

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


def sinks_for(log_to: Any) -> list[Sink]:
    """Make sinks for a SummaryWriter, a Lightning logger, or a list of these; none for None.

    Raises:
        AttentionMonitorError: on anything else.
    """
    if isinstance(log_to, list | tuple):
        return [sink for one in log_to for sink in sinks_for(one)]
    if log_to is None:
        return []
    for kind in SINKS:
        try:
            sink = kind.for_logger(log_to)
        except Exception as error:
            raise AttentionMonitorError(
                f"{kind.__name__}.for_logger failed for {log_to!r}: {type(error).__name__}: {error}; it is a class "
                "method that returns a sink, or None for a logger of another kind."
            ) from error
        if isinstance(sink, Sink):
            return [sink]
        if sink is not None:
            raise AttentionMonitorError(f"{kind.__name__}.for_logger returns a Sink or None, got {sink!r}.")
    raise AttentionMonitorError(
        f"Nothing can be logged to {log_to!r}: give a folder, a SummaryWriter, a Lightning logger, or a list; for a "
        "logger of another kind there is attention_monitor.Sink."
    )
