"""Weight on one key."""

from typing import ClassVar

from torch import Tensor

from ..detector import Detector


class Collapsed(Detector):
    kind = "collapsed attention"
    severity: ClassVar = "warning"
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
