"""What a statistic is, and which there are: one decorated function each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from ..errors import AttentionMonitorError
from .row_blocks import QUANTITIES, WHICH_ROWS

RowFunction = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Statistic:
    """An entry of the registry.

    Attributes:
        name: as in tags and configs.
        function: RowBlock, or Rows, -> (B, H, R), or what broadcasts to it; numbers, or bool for a fraction of rows.
        unit: of the value.
        range: of the value.
        reduce: how rows become a head's value.
        rows: attribute of RowBlock that says which rows count.
        self_attention_only: compares positions of queries and keys: NaN for cross-attention, and for self-attention
            to fewer keys than there are queries.
        needs: quantities of Rows that it reads beside those that are always there; None: it takes a RowBlock.
    """

    name: str
    function: RowFunction
    unit: str
    range: str
    reduce: Literal["mean", "max"]
    rows: str
    self_attention_only: bool
    needs: tuple[str, ...] | None


STATISTICS: dict[str, Statistic] = {}


def statistic(
    *,
    unit: str,
    range: str,
    reduce: Literal["mean", "max"] = "mean",
    rows: str = "informative",
    self_attention_only: bool = False,
    needs: Sequence[str] | None = None,
) -> Callable[[RowFunction], RowFunction]:
    """Register a function of a RowBlock as a statistic under its own name; with ``needs``, a function of Rows.

    Raises:
        AttentionMonitorError: on a range, rows or needs that cannot be, and on a name that is taken.
    """

    def register(function: RowFunction) -> RowFunction:
        name = function.__name__
        if ".." not in str(range) or rows not in WHICH_ROWS or reduce not in ("mean", "max"):
            raise AttentionMonitorError(
                f"The statistic {name!r} has range={range!r}, rows={rows!r}, reduce={reduce!r}; a range is two bounds "
                f"with '..' between them, such as '0..1' or '0..T', rows is one of {', '.join(WHICH_ROWS)}, and reduce "
                "is mean or max."
            )
        if not set(needs or ()) <= set(QUANTITIES):
            raise AttentionMonitorError(f"The statistic {name!r} has needs={needs!r}; known are {list(QUANTITIES)}.")
        if name in STATISTICS and STATISTICS[name].function.__module__ != function.__module__:
            raise AttentionMonitorError(f"There is a statistic {name!r} already; give yours another name.")
        STATISTICS[name] = Statistic(
            name, function, unit, range, reduce, rows, self_attention_only, None if needs is None else tuple(needs)
        )
        return function

    return register
