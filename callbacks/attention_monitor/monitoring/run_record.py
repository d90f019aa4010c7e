"""What a callback keeps of a run, beyond its recorder."""

from typing import Any

from ..diagnosis.roles import HeadRoles
from ..snapshots import Snapshot


class RunRecord:
    """The first and the newest live Snapshot of a run, and the roles of its heads.

    Attributes:
        first: first live Snapshot; None before there is one.
        latest: newest live Snapshot; None before there is one.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.forget()

    def forget(self) -> None:
        """Begin another run."""
        self.first: Snapshot | None = None
        self.latest: Snapshot | None = None
        self._roles = HeadRoles()

    def keep(self, seen: Snapshot | None) -> None:
        """Take in what a sampled step has given; None: it had no attention."""
        self.latest = seen or self.latest
        self.first = self.first or seen

    @property
    def roles(self) -> dict[str, dict[str, int]]:
        """Roles that heads have: head -> role -> step at which it took that on."""
        return self._roles.since()
