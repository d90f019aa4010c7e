"""NaN and infinity."""

from typing import ClassVar

from torch import Tensor

from ..detector import Detector


class NonFinite(Detector):
    kind = "non-finite attention"
    severity: ClassVar = "error"
    statistics = ("nonfinite_fraction",)
    advice = (
        "NaN or infinity in queries, keys or scores: look for an overflow in half precision, non-finite weights or "
        "inputs, a learning rate that is too high; the lowest layer named is where it began."
    )

    def troubled(self, values: dict[str, Tensor]) -> Tensor:
        return values["nonfinite_fraction"] > 0

    def describe(self, values: dict[str, float]) -> str:
        return f"{values['nonfinite_fraction']:.0%} of rows"
