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
        """Take in a snapshot of a probe; whether a head has taken on a role, or lost one."""
        before = dict(self._since)
        for score in snapshot.scores:
            for record, head, value in snapshot.heads(score.name):
                key = head_name(record.label, head), score.role, snapshot.source
                if value >= score.threshold:
                    self._since.setdefault(key, snapshot.step)
                else:
                    self._since.pop(key, None)
        return before != self._since

    def since(self) -> dict[str, dict[str, int]]:
        """Return head -> role -> step at which that was first seen, heads in order."""
        roles: dict[str, dict[str, int]] = {}
        for (head, role, _), step in sorted(self._since.items()):
            known = roles.setdefault(head, {})
            known[role] = min(step, known.get(role, step))
        return roles

    def state(self) -> list[list[Any]]:
        """Return what ``load`` takes: plain lists."""
        return [[*key, step] for key, step in self._since.items()]

    def load(self, state: list[list[Any]]) -> None:
        """Go on from what ``state`` gave."""
        self._since = {(head, role, source): step for head, role, source, step in state}

    def table(self) -> str:
        """Write the roles as a table in Markdown."""
        rows = [f"| {head} | {role} | {step} |" for head, roles in self.since().items() for role, step in roles.items()]
        return "\n".join(["| head | role | since step |", "| --- | --- | --- |", *rows])
