"""Numbers of rows -> numbers of heads, over the calls of a site and over processes."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..capturing.attention_call import AttentionCall
from .catalogue import DEFAULT_STATISTICS, resolve_statistics
from .registry import Statistic
from .row_blocks import BufferPool, RowBlock, row_spans
from .rows import ALWAYS_COMPUTED, RowColumns, Rows


class HeadTotals:
    """Running totals over the calls of one site; ``values`` turns them into one number for each head.

    Args:
        statistics: statistics to compute.
        max_rows: number of query rows of a call to look at, in blocks spread over it evenly; None: all.
        buffers: memory to share with other totals; None: memory of its own.
        on_failure: function that is told the name and the exception of a statistic that fails, which then has no
            values; None: the exception is raised.

    Attributes:
        packed: (2, statistics, H) float64: first sums, or maxima, over the rows that count, then the number of those
            rows; None before the first call. One tensor, so that processes exchange it in one message.
    """

    def __init__(
        self,
        statistics: Iterable[Statistic],
        max_rows: int | None = None,
        buffers: BufferPool | None = None,
        on_failure: Callable[[str, Exception], None] | None = None,
    ) -> None:
        self.statistics, self.max_rows, self._on_failure = list(statistics), max_rows, on_failure
        self.packed: Tensor | None = None
        self._buffers = buffers or BufferPool()

    def add(self, call: AttentionCall) -> None:
        """Add the rows of a call."""
        if not self.statistics:
            return
        seen = 0 not in call.shape
        present = [seen and _makes_sense(stat, call) for stat in self.statistics]
        shape: tuple[int, ...] = (1, call.shape[1], 1)
        if any(present):
            rows, of_blocks = self._rows(call, [stat for i, stat in enumerate(self.statistics) if present[i]])
            shape = rows.max_score.shape
        values = torch.zeros((len(present), *shape), dtype=call.compute_dtype, device=call.device)
        counted = torch.zeros((len(present), *shape), dtype=torch.bool, device=call.device)
        for i, stat in enumerate(self.statistics):
            if present[i]:
                values[i] = of_blocks[stat.name] if stat.needs is None else self._value(stat, rows)
                counted[i] = getattr(rows, stat.rows)
        self.merge(_packed(self.statistics, values, counted))

    def _rows(self, call: AttentionCall, statistics: Sequence[Statistic]) -> tuple[Rows, dict[str, Tensor]]:
        """Return the rows to look at with what statistics need, and the values of statistics that take a RowBlock.

        Statistics of the first kind are computed once over all rows, those of the second kind block by block.
        """
        needs = dict.fromkeys([*ALWAYS_COMPUTED, *(name for stat in statistics for name in stat.needs or ())])
        of_blocks = [stat for stat in statistics if stat.needs is None]
        blocks = list(row_spans(call, self.max_rows))
        row = torch.cat([torch.arange(*span, device=call.device) for span in blocks])
        kernel = None if of_blocks else _kernel_for(call)
        if kernel is not None:
            try:
                return kernel.rows_of(call, row), {}
            except Exception as error:  # no compiler, a device that Triton does not know
                _without_kernel.append(str(error))
                warnings.warn(f"AttentionMonitor goes on without its Triton kernel: {error}", stacklevel=2)
        n_keys, quantities, values = RowColumns(row), RowColumns(row), RowColumns(row)
        for start, stop in blocks:
            block = RowBlock(call, start, stop, self._buffers)
            n_keys.add({"n_keys": block.n_keys})
            quantities.add({name: getattr(block, name) for name in needs})
            values.add({stat.name: self._value(stat, block) for stat in of_blocks})
        return Rows(call, row, n_keys["n_keys"], quantities), values

    def _value(self, stat: Statistic, rows: Rows) -> Tensor:
        """Return the numbers of a statistic, (B, H, R); NaN when it fails."""
        try:
            return stat.function(rows).expand(rows.max_score.shape).to(rows.max_score)  # one dtype in all blocks
        except Exception as error:
            if self._on_failure is None:
                raise
            self._on_failure(stat.name, error)
            return torch.full_like(rows.max_score, torch.nan)

    def merge(self, packed: Tensor) -> None:
        """Add the totals of another process or site, of the same statistics: (2, statistics, H)."""
        if self.packed is None:
            self.packed = packed
            return
        both = torch.stack([self.packed, packed.to(self.packed.device)])
        self.packed = torch.where(_takes_maximum(self.statistics, packed), both.amax(0), both.sum(0))

    def on_cpu(self) -> Tensor | None:
        """Return ``packed`` on the CPU, in one transfer."""
        return None if self.packed is None else self.packed.cpu()

    def values(self) -> dict[str, Tensor]:
        """Return statistic -> (H,) float32 on the CPU; NaN where no row counted."""
        packed = self.on_cpu()
        if packed is None:
            return {}
        totals, counts = packed
        means = totals / torch.where(_takes_maximum(self.statistics, packed)[0], 1, counts)
        values = means.where(counts > 0, torch.nan).float()
        return dict(zip((stat.name for stat in self.statistics), values, strict=True))


def _makes_sense(stat: Statistic, call: AttentionCall) -> bool:
    if stat.tokens_only and call.over != "tokens":
        return False
    return call.has_positions or not stat.self_attention_only


_without_kernel: list[str] = []  # errors of the kernel in this process: after the first, it is not tried again


def _kernel_for(call: AttentionCall) -> Any:
    """Return the module with the GPU kernel if it can take a call, None otherwise."""
    if call.device.type != "cuda" or _without_kernel:
        return None
    try:
        from . import kernel
    except ImportError:  # no Triton
        return None
    return kernel if kernel.supports(call) else None


def _packed(statistics: Sequence[Statistic], rows: Tensor, counted: Tensor) -> Tensor:
    """Return totals and counts, (2, statistics, H).

    Args:
        statistics: statistics of the first axis of the others.
        rows: (statistics, B, H, R) numbers of rows.
        counted: (statistics, B, H, R) bool, rows that count.
    """
    sums = rows.masked_fill(~counted, 0).sum((1, 3), dtype=torch.float64)
    counts = counted.sum((1, 3), dtype=torch.float64)
    packed = torch.stack([sums, counts])
    for i, stat in enumerate(statistics):
        if stat.reduce == "max":
            packed[0, i] = rows[i].masked_fill(~counted[i], -torch.inf).amax((0, 2))
    return packed


def _takes_maximum(statistics: Sequence[Statistic], packed: Tensor) -> Tensor:
    """Return a mask (2, statistics, 1) of what is a maximum and not a sum."""
    is_max = torch.tensor([stat.reduce == "max" for stat in statistics], device=packed.device)
    return torch.stack([is_max, torch.zeros_like(is_max)])[..., None]


def summarize(call: AttentionCall, statistics: Sequence[str] = DEFAULT_STATISTICS) -> dict[str, Tensor]:
    """Compute statistics of every head of one attention call.

    Args:
        call: attention call, such as one of those that ``capture`` collects.
        statistics: names of statistics in the registry.

    Returns:
        statistic -> (H,) float32: means over the rows that count, NaN where no row counts.

    Raises:
        AttentionMonitorError: on an unknown statistic.

    Example:
        >>> import torch
        >>> from attention_monitor import AttentionCall, summarize
        >>> query = key = torch.zeros(1, 2, 4, 8)  # (B, H, T, D): every key has the same score
        >>> call = AttentionCall("attn", query, key, is_causal=True)
        >>> summarize(call, ["normalized_entropy", "max_score"])
        {'normalized_entropy': tensor([1., 1.]), 'max_score': tensor([0., 0.])}
    """
    totals = HeadTotals(resolve_statistics(statistics))
    with torch.no_grad():
        totals.add(call)
    return totals.values()
