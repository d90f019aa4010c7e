"""What a callback keeps of a run, beyond its recorder."""

from ..diagnosis.roles import HeadRoles
from ..snapshots import Snapshot


class RunRecord:
    """The first and the newest live Snapshot of a run, and the roles of its heads.

    Attributes:
        first: first live Snapshot; None before there is one.
        latest: newest live Snapshot; None before there is one.
    """

    first: Snapshot | None
    latest: Snapshot | None
    _roles: HeadRoles

    def _begin_run(self) -> None:
        self.first, self.latest, self._roles = None, None, HeadRoles()

    def _keep(self, seen: Snapshot | None) -> None:
        """Take in what a sampled step has given; None: it had no attention."""
        self.latest = seen or self.latest
        self.first = self.first or seen

    @property
    def roles(self) -> dict[str, dict[str, int]]:
        """Roles that heads have: head -> role -> step at which that was first seen."""
        return self._roles.since()
