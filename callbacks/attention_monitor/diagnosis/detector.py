"""What a detector is: it looks for one kind of trouble."""

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

from torch import Tensor


class Detector(ABC):
    """Reads per-head values of one site, statistic -> (H,). Subclasses register themselves."""

    kind: ClassVar[str]
    severity: ClassVar[Literal["error", "warning"]]  # errors are told first
    statistics: ClassVar[tuple[str, ...]]
    advice: ClassVar[str]

    def __init_subclass__(cls) -> None:
        DETECTORS.append(cls)

    @abstractmethod
    def troubled(self, values: dict[str, Tensor]) -> Tensor:
        """(H,) bool."""

    @abstractmethod
    def describe(self, values: dict[str, float]) -> str:
        """The numbers of one head in trouble."""


DETECTORS: list[type[Detector]] = []
