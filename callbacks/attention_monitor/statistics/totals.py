"""Numbers of rows -> numbers of heads, over the calls of a site and over processes."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..capturing.attention_call import AttentionCall
from .catalogue import DEFAULT_STATISTICS, resolve_statistics
from .registry import Statistic
from .row_blocks import ALWAYS, Collected, RowBlock, Rows, Workspace, spans


class HeadTotals:
    """Running totals over the calls of one site; ``values`` turns them into one number per head.

    Args:
        statistics: to take.
        max_rows: query rows of a call that are looked at, in blocks that are spread over it evenly; None: all.
        workspace: to share with other totals.
        on_failure: told of a statistic that fails, which then has no values; None: its exception is raised.

    Attributes:
        packed: (2, statistics, H), float64: sums or maxima of the rows that count, and how many those are; None before
            the first call.
    """

    def __init__(
        self,
        statistics: Iterable[Statistic],
        max_rows: int | None = None,
        workspace: Workspace | None = None,
        on_failure: Callable[[str, Exception], None] | None = None,
    ) -> None:
        self.statistics, self.max_rows, self._on_failure = list(statistics), max_rows, on_failure
        self.packed: Tensor | None = None
        self._workspace = workspace or Workspace()

    def add(self, call: AttentionCall) -> None:
        """Take in the rows of a call."""
        if not self.statistics:
            return
        seen = 0 not in call.shape
        present = [seen and (call.has_positions or not stat.self_attention_only) for stat in self.statistics]
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
        """All rows that are looked at, with what the statistics need; and the values of those that take a RowBlock."""
        needs = dict.fromkeys([*ALWAYS, *(name for stat in statistics for name in stat.needs or ())])
        of_blocks = [stat for stat in statistics if stat.needs is None]
        blocks = list(spans(call, self.max_rows))
        row = torch.cat([torch.arange(*span, device=call.device) for span in blocks])
        kernel = None if of_blocks else _kernel_for(call)
        if kernel is not None:
            try:
                return kernel.rows_of(call, row), {}
            except Exception as error:  # no compiler, a device that Triton does not know
                _without_kernel.append(str(error))
                warnings.warn(f"AttentionMonitor goes on without its Triton kernel: {error}", stacklevel=2)
        n_keys, quantities, values = Collected(row), Collected(row), Collected(row)
        for start, stop in blocks:
            block = RowBlock(call, start, stop, self._workspace)
            n_keys.add({"n_keys": block.n_keys})
            quantities.add({name: getattr(block, name) for name in needs})
            values.add({stat.name: self._value(stat, block) for stat in of_blocks})
        return Rows(call, row, n_keys["n_keys"], quantities), values

    def _value(self, stat: Statistic, rows: Rows) -> Tensor:
        """(B, H, R); NaN when the statistic fails."""
        try:
            return stat.function(rows).expand(rows.max_score.shape).to(rows.max_score)  # blocks have one type
        except Exception as error:
            if self._on_failure is None:
                raise
            self._on_failure(stat.name, error)
            return torch.full_like(rows.max_score, torch.nan)

    def merge(self, packed: Tensor) -> None:
        """Take in the totals of others with the same statistics."""
        if self.packed is None:
            self.packed = packed
            return
        both = torch.stack([self.packed, packed.to(self.packed.device)])
        self.packed = torch.where(_takes_maximum(self.statistics, packed), both.amax(0), both.sum(0))

    def on_cpu(self) -> Tensor | None:
        """``packed``, in one transfer."""
        return None if self.packed is None else self.packed.cpu()

    def values(self) -> dict[str, Tensor]:
        """statistic -> (H,) float32 on the CPU; NaN where no row counted."""
        packed = self.on_cpu()
        if packed is None:
            return {}
        totals, counts = packed
        means = totals / torch.where(_takes_maximum(self.statistics, packed)[0], 1, counts)
        values = means.where(counts > 0, torch.nan).float()
        return dict(zip((stat.name for stat in self.statistics), values, strict=True))


_without_kernel: list[str] = []  # why the kernel is not used


def _kernel_for(call: AttentionCall) -> Any:
    """The module with the GPU kernel, where it is of use for a call."""
    if call.device.type != "cuda" or _without_kernel:
        return None
    try:
        from . import kernel
    except ImportError:  # no Triton
        return None
    return kernel if kernel.supports(call) else None


def _packed(statistics: Sequence[Statistic], rows: Tensor, counted: Tensor) -> Tensor:
    """(2, statistics, H) totals and counts of rows and whether they count, both (statistics, B, H, Q)."""
    sums = rows.masked_fill(~counted, 0).sum((1, 3), dtype=torch.float64)
    counts = counted.sum((1, 3), dtype=torch.float64)
    packed = torch.stack([sums, counts])
    for i, stat in enumerate(statistics):
        if stat.reduce == "max":
            packed[0, i] = rows[i].masked_fill(~counted[i], -torch.inf).amax((0, 2))
    return packed


def _takes_maximum(statistics: Sequence[Statistic], packed: Tensor) -> Tensor:
    """Which of (2, statistics, 1) are maxima and not sums."""
    is_max = torch.tensor([stat.reduce == "max" for stat in statistics], device=packed.device)
    return torch.stack([is_max, torch.zeros_like(is_max)])[..., None]


def summarize(call: AttentionCall, statistics: Sequence[str] = DEFAULT_STATISTICS) -> dict[str, Tensor]:
    """Per-head statistics of one attention call.

    Args:
        call: from ``capture``.
        statistics: names from the registry.

    Returns:
        statistic -> (H,), float32; means over the rows that count, NaN where none does.

    Raises:
        AttentionMonitorError: on an unknown statistic.
    """
    totals = HeadTotals(resolve_statistics(statistics))
    with torch.no_grad():
        totals.add(call)
    return totals.values()
