"""Where a writer writes to: one class for each kind of logger."""

import io
from os import PathLike
from typing import Any, Protocol

import numpy as np
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary

from ..errors import AttentionMonitorError


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
