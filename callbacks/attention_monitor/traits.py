"""What a head can be, in one vocabulary: from which number on, and why from there.

The roles that probes find, how a map looks on one text, and what detectors warn of take words and thresholds from here.

Shapes: H heads.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

# Adding this to the accuracy of the best fixed offset gives what a head must reach to follow a relation (Voita et al.
# 2019).
ABOVE_BASELINE = 0.1


@dataclass(frozen=True)
class Condition:
    """A bound on one column of values.

    Attributes:
        column: name of the statistic or score.
        sign: side of the threshold on which the condition holds.
        threshold: the bound.
    """

    column: str
    sign: Literal[">=", ">", "<"]
    threshold: float

    def __post_init__(self) -> None:
        if self.sign not in (">=", ">", "<"):
            raise ValueError(f"The sign of a condition is >=, > or <, got {self.sign!r}.")

    def holds(self, values: Mapping[str, Any]) -> Any:
        """Compare the column, (H,), with the threshold: (H,) bool; False for NaN."""
        column = values[self.column]
        if self.sign == "<":
            return column < self.threshold
        return column > self.threshold if self.sign == ">" else column >= self.threshold

    def __str__(self) -> str:
        return f"{self.column} {self.sign} {self.threshold:g}"


@dataclass(frozen=True)
class Trait:
    """Something that a head can be.

    Attributes:
        name: word for it, in tables, tags and JSON.
        conditions: bounds that must all hold.
        why: source of the thresholds.
    """

    name: str
    conditions: tuple[Condition, ...]
    why: str

    def __post_init__(self) -> None:
        if not isinstance(self.conditions, tuple) or not self.conditions:
            raise ValueError(
                f"The trait {self.name!r} needs conditions, a tuple of one or more, got {self.conditions!r}."
            )

    @property
    def rule(self) -> str:
        """The conditions in words, such as ``max_weight > 0.5 and sparsity > 0.5``."""
        return " and ".join(map(str, self.conditions))

    @property
    def threshold(self) -> float:
        """Bound of the only condition."""
        [condition] = self.conditions
        return condition.threshold

    def holds(self, values: Mapping[str, Any]) -> Any:
        """Compare values, column -> (H,), with all conditions: (H,) bool."""
        first, *others = (condition.holds(values) for condition in self.conditions)
        for other in others:
            first = first & other
        return first


_MOST = "half of the weight; no threshold has been published"

# where a head looks
DIAGONAL = Trait("diagonal", (Condition("diagonal_mean", ">=", 0.5),), _MOST)
PREVIOUS_TOKEN = Trait("previous-token", (Condition("previous_token", ">=", 0.5),), _MOST)
SINK = Trait("sink", (Condition("first_token", ">=", 0.3),), "Gu et al. 2024")
POSITIONAL = Trait("positional", (Condition("positional", ">=", 0.9),), "Voita et al. 2019")
INDUCTION = Trait("induction", (Condition("induction", ">=", 0.5),), _MOST)
DUPLICATE_TOKEN = Trait("duplicate-token", (Condition("duplicate_token", ">=", 0.5),), _MOST)

# how its weight is spread
UNIFORM = Trait(
    "uniform",
    (Condition("normalized_entropy", ">", 0.9), Condition("weight_std", "<", 0.1)),
    "entropy near its largest value, and weights near one another",
)
SPARSE = Trait(
    "sparse",
    (Condition("max_weight", ">", 0.5), Condition("sparsity", ">", 0.5)),
    "one key has most of the weight, and most keys have next to none",
)

# what is wrong with it
NON_FINITE = Trait("non-finite", (Condition("nonfinite_fraction", ">", 0),), "one row is enough to lose a run")
COLLAPSED = Trait("collapsed", (Condition("collapse_fraction", ">", 0.5),), "more than half of the rows")
