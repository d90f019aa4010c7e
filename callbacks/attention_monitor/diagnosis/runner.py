"""Runs the detectors over snapshots."""

from collections.abc import Iterator
from importlib import import_module
from pkgutil import iter_modules

from ..naming import head_name
from ..snapshots import Snapshot
from . import detectors
from .detector import DETECTORS
from .finding import Finding

for _found in iter_modules(detectors.__path__):
    import_module(f"{detectors.__name__}.{_found.name}")  # each registers itself

MAX_NAMED = 8  # heads in one message


class Diagnosis:
    """Runs the detectors over snapshots; each kind of trouble of a head is reported once, when it begins."""

    def __init__(self) -> None:
        self.detectors = [cls() for cls in sorted(DETECTORS, key=lambda cls: cls.severity)]
        self._told: set[tuple[str, str]] = set()

    @property
    def statistics(self) -> list[str]:
        """What the detectors read."""
        return list(dict.fromkeys(name for detector in self.detectors for name in detector.statistics))

    def update(self, snapshot: Snapshot) -> list[Finding]:
        """Findings that are new at this snapshot."""
        new = [finding for finding in self._all(snapshot) if (finding.kind, finding.head) not in self._told]
        self._told |= {(finding.kind, finding.head) for finding in new}
        return new

    def explain(self, findings: list[Finding]) -> list[str]:
        """A sentence or two for each kind of finding, naming step and heads."""
        messages = []
        for detector in self.detectors:
            heads = [f"{f.head} ({f.detail})" for f in findings if f.kind == detector.kind]
            if heads:
                step = findings[0].step
                more = f" and {len(heads) - MAX_NAMED} more" if len(heads) > MAX_NAMED else ""
                messages.append(
                    f"{detector.kind} at step {step} in {', '.join(heads[:MAX_NAMED])}{more}. {detector.advice}"
                )
        return messages

    def _all(self, snapshot: Snapshot) -> Iterator[Finding]:
        for label, values in zip(snapshot.labels, snapshot.values, strict=True):
            for detector in self.detectors:
                for head in detector.troubled(values).nonzero().flatten().tolist():
                    detail = detector.describe({name: float(value[head]) for name, value in values.items()})
                    yield Finding(snapshot.step, detector.kind, head_name(label, head), detail)
