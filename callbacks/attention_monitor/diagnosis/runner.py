"""Runs the detectors over snapshots, and tells what is new."""

from ..discovery import load_modules
from ..errors import Once
from ..naming import listed
from ..snapshots import Snapshot
from . import detectors
from .detector import DETECTORS
from .finding import Finding

load_modules(detectors)

MAX_NAMED = 8  # heads in one message, which fill two or three lines of a terminal


class Diagnosis:
    """Runs the detectors over snapshots; each kind of trouble of a head is reported once, when it is first seen."""

    def __init__(self) -> None:
        self.detectors = [cls() for cls in sorted(DETECTORS, key=lambda cls: cls.severity)]  # "error" < "warning"
        self._once = Once()

    @property
    def statistics(self) -> list[str]:
        """Names of the statistics that the detectors read."""
        return list(dict.fromkeys(name for detector in self.detectors for name in detector.statistics))

    def update(self, snapshot: Snapshot) -> list[Finding]:
        """Return the findings that are new at a snapshot; a detector that fails is told once and finds nothing."""
        found: list[Finding] = []
        for detector in self.detectors:
            try:
                findings = list(detector.look(snapshot))
                if strangers := [one for one in findings if not isinstance(one, Finding)]:
                    raise TypeError(f"look() has to yield findings, got {strangers[0]!r}")
                found += findings
            except Exception as error:
                self._once.warn(
                    "detector",
                    detector.kind,
                    f"AttentionMonitor: the detector of {detector.kind} failed at step {snapshot.step}: "
                    f"{type(error).__name__}: {error}",
                    stacklevel=3,
                )
        return [finding for finding in found if self._once.is_new(finding.kind, finding.head)]

    def explain(self, findings: list[Finding]) -> list[str]:
        """Write a sentence or two for each kind of finding, naming step and heads."""
        messages = []
        for detector in self.detectors:
            heads = [f"{finding.head} ({finding.detail})" for finding in findings if finding.kind == detector.kind]
            if heads:
                step = findings[0].step
                messages.append(f"{detector.kind} at step {step} in {listed(heads, MAX_NAMED)}. {detector.advice}")
        return messages
