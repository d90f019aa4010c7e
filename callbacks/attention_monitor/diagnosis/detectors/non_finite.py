"""NaN and infinity."""

from collections.abc import Iterator

from ...snapshots import Snapshot
from ...traits import NON_FINITE
from ..detector import Detector
from ..finding import Finding


class NonFinite(Detector):
    """Finds heads with NaN or infinity in queries, scores or pattern."""

    kind = "non-finite attention"
    severity = "error"
    statistics = ("nonfinite_fraction",)
    advice = (
        "NaN or infinity in queries, keys or scores. It need not have begun in the lowest layer named: what lies "
        "between that and the layer below is not looked at (its values, feed-forward, norms, the input), nor are the "
        "steps between samples. Look for an overflow in half precision, non-finite weights or inputs, a learning rate "
        "that is too high."
    )

    def look(self, snapshot: Snapshot) -> Iterator[Finding]:
        for record, head in snapshot.where(NON_FINITE):
            yield self.finding(snapshot, record, head, f"{record.values['nonfinite_fraction'][head]:.0%} of rows")
