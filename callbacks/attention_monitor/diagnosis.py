"""Numbers over time -> findings: what broke, in which head, at which step.

A detector is one subclass of ``Detector``: it says which statistics it reads, which heads of a site are in trouble,
and describes one.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from .naming import head_name
from .snapshots import Snapshot

MAX_NAMED = 8  # heads in one message


@dataclass(frozen=True)
class Finding:
    """Something wrong with one head at one step.

    Attributes:
        step: optimizer steps done before it was seen.
        kind: the detector's name for it.
        head: e.g. ``L03H05``, or ``encoder.attn/H05`` where layers are not a plain stack.
        detail: the numbers, with the threshold that fired.
    """

    step: int
    kind: str
    head: str
    detail: str


class Detector(ABC):
    """Reads per-head values of one site, statistic -> (H,). Subclasses register themselves."""

    kind: ClassVar[str]
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


class NonFinite(Detector):
    kind = "non-finite attention"
    statistics = ("nonfinite_fraction",)
    advice = (
        "NaN or infinity in queries, keys or scores: look for an overflow in half precision, non-finite weights or "
        "inputs, a learning rate that is too high; the lowest layer named is where it began."
    )

    def troubled(self, values: dict[str, Tensor]) -> Tensor:
        return values["nonfinite_fraction"] > 0

    def describe(self, values: dict[str, float]) -> str:
        return f"{values['nonfinite_fraction']:.0%} of rows"


class Collapsed(Detector):
    kind = "collapsed attention"
    statistics = ("collapse_fraction", "max_score")
    advice = (
        "More than half of the rows put over 0.95 of their weight on one key. A previous-token or induction head may "
        "look like that and be healthy; with a growing max score or a loss that stalls it is entropy collapse, and a "
        "lower learning rate, warm-up or QK-norm helps."
    )

    def troubled(self, values: dict[str, Tensor]) -> Tensor:
        return values["collapse_fraction"] > 0.5

    def describe(self, values: dict[str, float]) -> str:
        return f"{values['collapse_fraction']:.0%} of rows, max score {values['max_score']:.4g}"


class Diagnosis:
    """Runs the detectors over snapshots; each kind of trouble of a head is reported once, when it begins."""

    def __init__(self) -> None:
        self.detectors = [cls() for cls in DETECTORS]
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


class HeadRoles:
    """Which heads reach the threshold of a probe's score, and since when: induction, previous-token, sink, a relation.

    A head that falls below it again has lost the role.
    """

    def __init__(self) -> None:
        self._since: dict[tuple[str, str, str], int] = {}  # (head, role, source) -> step

    def update(self, snapshot: Snapshot) -> bool:
        """Whether a head has taken on a role, or lost one."""
        before = dict(self._since)
        for label, values in zip(snapshot.labels, snapshot.values, strict=True):
            for score in snapshot.scores:
                for head, value in enumerate(values[score.name].tolist()):
                    key = head_name(label, head), score.role, snapshot.source
                    if value >= score.threshold:
                        self._since.setdefault(key, snapshot.step)
                    else:
                        self._since.pop(key, None)
        return before != self._since

    def since(self) -> dict[str, dict[str, int]]:
        """head -> role -> step, heads in order."""
        roles: dict[str, dict[str, int]] = {}
        for (head, role, _), step in sorted(self._since.items()):
            known = roles.setdefault(head, {})
            known[role] = min(step, known.get(role, step))
        return roles

    def state(self) -> list[list[Any]]:
        """What ``load`` takes: plain lists."""
        return [[*key, step] for key, step in self._since.items()]

    def load(self, state: list[list[Any]]) -> None:
        self._since = {(head, role, source): step for head, role, source, step in state}

    def table(self) -> str:
        """The same as a table in Markdown."""
        rows = [f"| {head} | {role} | {step} |" for head, roles in self.since().items() for role, step in roles.items()]
        return "\n".join(["| head | role | since step |", "| --- | --- | --- |", *rows])
