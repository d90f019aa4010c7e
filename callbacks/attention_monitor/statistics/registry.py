"""What a statistic is, and the registry of all: one decorated function each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from ..errors import AttentionMonitorError
from .rows import QUANTITIES, ROW_FILTERS

RowFunction = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Statistic:
    """A statistic of attention heads: an entry of the registry.

    Attributes:
        name: name in tags and configs.
        function: function from a RowBlock, or Rows, to (B, H, R) or what broadcasts to it: numbers, or bool for a
            fraction of rows.
        unit: unit of the value, such as ``nats``.
        range: lowest and highest possible value, such as ``0..1``.
        reduce: way in which the numbers of rows become the value of a head.
        rows: attribute of Rows that says which rows count, one of ROW_FILTERS.
        self_attention_only: True if it compares positions of queries and keys. It is then NaN for cross-attention, and
            for self-attention to fewer keys than there are queries.
        tokens_only: True if it speaks of certain tokens. It is then NaN where every query has keys of its own, or
            keys are channels.
        needs: quantities of Rows that the function reads beside ALWAYS_COMPUTED; None: the function takes a RowBlock.
    """

    name: str
    function: RowFunction
    unit: str
    range: str
    reduce: Literal["mean", "max"]
    rows: str
    self_attention_only: bool
    tokens_only: bool
    needs: tuple[str, ...] | None


STATISTICS: dict[str, Statistic] = {}


def statistic(
    *,
    unit: str,
    range: str,
    reduce: Literal["mean", "max"] = "mean",
    rows: str = "informative",
    self_attention_only: bool = False,
    tokens_only: bool = False,
    needs: Sequence[str] | None = None,
) -> Callable[[RowFunction], RowFunction]:
    """Register the decorated function as a statistic under its own name.

    Args:
        unit: unit of the value, such as ``nats``.
        range: lowest and highest possible value, such as ``0..1`` or ``0..T``.
        reduce: way in which the numbers of rows become the value of a head.
        rows: rows that count, one of ROW_FILTERS.
        self_attention_only: the function compares positions of queries and keys.
        tokens_only: the function speaks of certain tokens, and not of a query's own neighbours or of channels.
        needs: quantities that the function reads, of those that ``Rows`` lists; it then takes ``Rows``, which costs
            less. None: it takes a ``RowBlock``, with all weights of the rows.

    Returns:
        A decorator that gives the function back as it is.

    Raises:
        AttentionMonitorError: on a range, rows or needs that are not possible, and on a name that is taken.

    Example:
        >>> import torch
        >>> from attention_monitor import STATISTICS, AttentionCall, statistic, summarize
        >>> @statistic(unit="1", range="0..1")
        ... def weight_on_last_key(block):
        ...     \"\"\"Weight on the last key.\"\"\"
        ...     return block.weights[..., -1]
        >>> call = AttentionCall("attn", query=torch.zeros(1, 2, 4, 8), key=torch.zeros(1, 2, 4, 8))
        >>> summarize(call, ["weight_on_last_key"])
        {'weight_on_last_key': tensor([0.2500, 0.2500])}
        >>> del STATISTICS["weight_on_last_key"]  # what was for this example alone
    """

    def register(function: RowFunction) -> RowFunction:
        name = function.__name__
        if ".." not in str(range) or rows not in ROW_FILTERS or reduce not in ("mean", "max"):
            raise AttentionMonitorError(
                f"The statistic {name!r} has range={range!r}, rows={rows!r}, reduce={reduce!r}; a range is two bounds "
                f"with '..' between them, such as '0..1' or '0..T', rows is one of {', '.join(ROW_FILTERS)}, and "
                "reduce is mean or max."
            )
        if not set(needs or ()) <= set(QUANTITIES):
            raise AttentionMonitorError(
                f"The statistic {name!r} has needs={needs!r}; known are {list(QUANTITIES)}: name only those, or leave "
                "needs out to read weights."
            )
        if name in STATISTICS and STATISTICS[name].function.__module__ != function.__module__:
            raise AttentionMonitorError(f"There is a statistic {name!r} already; give yours another name.")
        needed = None if needs is None else tuple(needs)
        STATISTICS[name] = Statistic(
            name, function, unit, range, reduce, rows, self_attention_only, tokens_only, needed
        )
        return function

    return register
