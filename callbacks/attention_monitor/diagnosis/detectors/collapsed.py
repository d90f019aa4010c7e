"""Weight on one key."""

from collections.abc import Iterator

from ...snapshots import Snapshot
from ...traits import COLLAPSED
from ..detector import Detector
from ..finding import Finding


class Collapsed(Detector):
    """Finds heads of which more than half of the rows put nearly all weight on one key."""

    kind = "collapsed attention"
    severity = "warning"
    statistics = ("collapse_fraction", "max_score")
    advice = (
        "More than half of the rows put over 0.95 of their weight on one key. A previous-token or induction head may "
        "look like that and be healthy; with a growing max score or a loss that stalls it may be entropy collapse, "
        "against which a lower learning rate, warm-up or QK-norm may help."
    )

    def look(self, snapshot: Snapshot) -> Iterator[Finding]:
        for record, head in snapshot.where(COLLAPSED):
            fraction, score = (float(record.values[name][head]) for name in self.statistics)
            yield self.finding(snapshot, record, head, f"{fraction:.0%} of rows, max score {score:.4g}")
