"""What a detector is: it looks for one kind of trouble in every Snapshot of training."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar, Literal

from ..errors import AttentionMonitorError
from ..naming import head_name
from ..snapshots import SiteRecord, Snapshot
from .finding import Finding


class Detector(ABC):
    """Looks for one kind of trouble. Subclasses register themselves.

    A run has one instance of each detector, which may remember what it has seen.

    Attributes:
        kind: name of the trouble, as in messages.
        severity: ``error`` where training is broken, ``warning`` where it goes on; errors are told first.
        statistics: names of the statistics that the detector reads; they are taken of training for it.
        advice: what it means and what to do, for people.

    Example:
        >>> class Unfocused(Detector):
        ...     kind = "unfocused attention"
        ...     severity = "warning"
        ...     statistics = ("normalized_entropy",)
        ...     advice = "Heads that stay uniform have not learnt where to look."
        ...
        ...     def look(self, snapshot):
        ...         for record, head, value in snapshot.heads("normalized_entropy"):
        ...             if snapshot.step >= 1000 and value > 0.99:
        ...                 yield self.finding(snapshot, record, head, f"normalized entropy {value:.2f}")
        >>> DETECTORS.remove(Unfocused)
    """

    kind: ClassVar[str]
    severity: ClassVar[Literal["error", "warning"]]
    statistics: ClassVar[tuple[str, ...]]
    advice: ClassVar[str]

    def __init_subclass__(cls) -> None:
        if cls.look is Detector.look:  # a base for others
            return
        for name in ("kind", "advice"):
            if not isinstance(getattr(cls, name, None), str):
                raise AttentionMonitorError(f"The detector {cls.__name__} needs {name}, a text.")
        if getattr(cls, "severity", None) not in ("error", "warning"):
            raise AttentionMonitorError(f"The detector {cls.__name__} needs severity, 'error' or 'warning'.")
        names = getattr(cls, "statistics", None)
        if not isinstance(names, tuple | list) or not all(isinstance(name, str) for name in names):
            raise AttentionMonitorError(
                f"The detector {cls.__name__} needs statistics, the names of those it reads, such as ('max_score',); "
                f"got {names!r}."
            )
        for other in [other for other in DETECTORS if other.kind == cls.kind]:
            if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
                raise AttentionMonitorError(
                    f"There is a detector of {cls.kind!r} already, {other.__name__}; give {cls.__name__} another kind."
                )
            DETECTORS.remove(other)  # the same one, defined anew, as in a notebook
        DETECTORS.append(cls)

    @abstractmethod
    def look(self, snapshot: Snapshot) -> Iterator[Finding]:
        """Yield a Finding for every head that is in trouble at a live Snapshot, also where it was before.

        Reads ``snapshot.heads(name)`` or ``snapshot.where(trait)`` of the statistics that it names.
        """

    def finding(self, snapshot: Snapshot, record: SiteRecord, head: int, detail: str) -> Finding:
        """Make the Finding for one head.

        Args:
            snapshot: Snapshot in which the head is in trouble.
            record: record of the head's site.
            head: number of the head there.
            detail: the numbers, with the threshold that fired.
        """
        return Finding(snapshot.step, self.kind, head_name(record.label, head), detail)


DETECTORS: list[type[Detector]] = []
