"""Which heads do what, and since when."""

from typing import Any

from ..naming import head_name
from ..snapshots import Snapshot


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
