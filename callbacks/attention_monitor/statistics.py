"""AttentionCall -> one number per head, in blocks of query rows, never the whole Q x K.

A statistic is one decorated function, which gives one number a row, (B, H, R): of a ``RowBlock``, where it looks at
weights, or of ``Rows``, where the few numbers that are kept of each row are enough. The engine reduces rows to heads.
Notation and shapes as in ``rows.py``.
"""

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .capturing.attention_call import AttentionCall
from .errors import AttentionMonitorError
from .rows import ALWAYS, QUANTITIES, WHICH_ROWS, Collected, RowBlock, Rows, Workspace, spans

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


@statistic(unit="nats", range="0..ln n_i", needs=[])
def entropy(rows: Rows) -> Tensor:
    """Shannon entropy of the row, -sum_j p ln p = lse_i - sum_j p_ij s_ij.

    Source: Ghader and Monz 2017; Zhai et al. 2023, whose attention entropy collapse is its fall to 0.
    """
    return rows.entropy


@statistic(unit="1", range="0..1", needs=[])
def normalized_entropy(rows: Rows) -> Tensor:
    """Entropy over the most it can be, ln n_i: 1 exactly when the row is uniform over the keys it may see.

    Over ln T, as often seen, uniform causal attention would look focused: 0.735 at T = 32.
    """
    return rows.entropy / rows.n_keys.to(rows.max_score.dtype).log()


@statistic(unit="nats", range="0..ln n_i", needs=[])
def max_entropy(rows: Rows) -> Tensor:
    """Entropy that the row would have if it were uniform, ln n_i: what ``entropy`` is to be compared with."""
    return rows.n_keys.to(rows.max_score.dtype).log() + 0 * rows.entropy  # NaN for a row that has one


@statistic(unit="1", range="0..1", self_attention_only=True, needs=["own_weight"])
def diagonal_mean(rows: Rows) -> Tensor:
    """Weight on the token itself, p_ii.

    Source: Clark et al. 2019.
    """
    return rows.own_weight


@statistic(
    unit="1", range="0..1", rows="informative_with_previous", self_attention_only=True, needs=["previous_weight"]
)
def previous_token(rows: Rows) -> Tensor:
    """Weight on the token before, p_{i,i-1}.

    Source: previous-token heads of Clark et al. 2019, Voita et al. 2019, Olsson et al. 2022.
    """
    return rows.previous_weight


@statistic(unit="1", range="0..1", needs=["first_weight"])
def first_token(rows: Rows) -> Tensor:
    """Weight on the first key, p_{i,0}: the mass of an attention sink. Of a sequence padded at its left, that is 0.

    Source: Xiao et al. 2023; Gu et al. 2024.
    """
    return rows.first_weight


@statistic(unit="keys", range="1..n_i", needs=["sum_of_squares"])
def effective_keys(rows: Rows) -> Tensor:
    """How many keys the weight is spread over, 1 / sum_j p_ij^2: n_i for a uniform row, 1 for a one-hot row.

    Source: the inverse participation ratio; Hill number of order 2 (Hill 1973).
    """
    return 1 / rows.sum_of_squares


@statistic(unit="tokens", range="0..T", self_attention_only=True, needs=["distance"])
def mean_distance(rows: Rows) -> Tensor:
    """How far the row looks, sum_j p_ij |i - j|.

    Source: mean attention distance of Vig and Belinkov 2019.
    """
    return rows.distance


@statistic(unit="fraction of keys", range="0..1")
def sparsity(block: RowBlock, threshold: float = 0.1) -> Tensor:
    """Keys that the row may see and gives less than ``threshold`` of its weight, p_ij < 0.1."""
    n_small = ((block.weights < threshold) & block.allowed).sum(-1)
    return n_small / block.n_keys + 0 * block.entropy  # NaN for a row that has one


@statistic(unit="1", range="0..0.5")
def weight_std(block: RowBlock) -> Tensor:
    """Standard deviation of p_ij over the keys that the row may see: 0 for a uniform row."""
    n = block.n_keys.to(block.max_score.dtype)
    # not by the sum of squares: close to uniform that would leave nothing but rounding
    deviation = (block.weights - 1 / n[..., None]).masked_fill(~block.allowed, 0)
    return ((deviation * deviation).sum(-1) / n).sqrt()


@statistic(unit="1", range="0..1", rows="visible", self_attention_only=True, needs=["later_weight"])
def future_mass(rows: Rows) -> Tensor:
    """Weight on later tokens, sum_j p_ij for j > i: 0 in a causal model, unless its mask leaks."""
    return rows.later_weight + 0 * rows.entropy  # NaN for a row that has one


@statistic(unit="1", range="0..1", self_attention_only=True)
def past_mass(block: RowBlock) -> Tensor:
    """Weight on earlier tokens, sum_j p_ij for j < i."""
    return block.position_weights.masked_fill(block.key_pos >= block.query_pos[:, None], 0).sum(-1)


@statistic(unit="fraction of rows", range="0..1", rows="not_padded", needs=[])
def fully_masked_rows(rows: Rows) -> Tensor:
    """Rows that may see no key. They are in no other statistic."""
    return rows.n_keys == 0


@statistic(unit="1", range="0..1", needs=[])
def max_weight(rows: Rows) -> Tensor:
    """Largest weight of the row, max_j p_ij.

    Source: "confidence" of Voita et al. 2019.
    """
    return rows.max_weight


@statistic(unit="fraction of rows", range="0..1", needs=[])
def collapse_fraction(rows: Rows, threshold: float = 0.95) -> Tensor:
    """Rows that put more than ``threshold`` of their weight on one key, max_j p_ij > 0.95.

    High in healthy previous-token and induction heads too: read it with max_score.
    """
    return (rows.max_weight > threshold) + 0 * rows.max_weight  # NaN for a row that has one


@statistic(unit="score", range="-inf..inf", reduce="max", rows="visible", needs=[])
def max_score(rows: Rows) -> Tensor:
    """Largest score, max_j s_ij, and the largest over all rows: the "max attention logit".

    Source: Dehghani et al. 2023 and Wortsman et al. 2023 (QK-norm), Kimi K2 2025 (QK-clip, threshold 100).
    """
    return rows.max_score


@statistic(unit="fraction of rows", range="0..1", rows="visible", needs=[])
def nonfinite_fraction(rows: Rows) -> Tensor:
    """Rows with NaN or infinity in q_i, in the scores (other than masked -inf) or in p.

    Unlike the other fractions it counts rows that see a single key too: a NaN must not hide there.
    """
    # an infinite query may have finite scores after a soft cap
    return ~rows.entropy.isfinite() | (rows.nonfinite("query") > 0)


@statistic(unit="fraction of rows", range="0..1", rows="not_padded", needs=[])
def nonfinite_query(rows: Rows) -> Tensor:
    """Rows with NaN or infinity in q_i. Not known where the model hands on nothing but its scores."""
    return rows.nonfinite("query")


@statistic(unit="fraction of keys", range="0..1", rows="not_padded", needs=[])
def nonfinite_key(rows: Rows) -> Tensor:
    """Keys with NaN or infinity in k_j. Not known where the model hands on nothing but its scores."""
    return rows.nonfinite("key")


@statistic(unit="fraction of keys", range="0..1", rows="not_padded", needs=[])
def nonfinite_value(rows: Rows) -> Tensor:
    """Keys with NaN or infinity in v_j. Not known where the model hands on nothing but its scores."""
    return rows.nonfinite("value")


# What a training run wants to see, and what costs next to nothing beside the scores themselves.
DEFAULT_STATISTICS = (
    "entropy",
    "normalized_entropy",
    "diagonal_mean",
    "previous_token",
    "first_token",
    "max_weight",
    "collapse_fraction",
    "max_score",
    "nonfinite_fraction",
)


def resolve_statistics(names: Sequence[str]) -> list[Statistic]:
    """The registry's entries for ``names``.

    Raises:
        AttentionMonitorError: on a name that is not registered.
    """
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list | tuple):
        raise AttentionMonitorError(
            f"statistics must be a list of names, got {names!r}; known are {sorted(STATISTICS)}."
        )
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if twice:
        raise AttentionMonitorError(f"The statistic {twice[0]!r} is named twice; name each once.")
    unknown = [name for name in names if name not in STATISTICS]
    if unknown:
        raise AttentionMonitorError(
            f"Unknown statistic {', '.join(map(repr, unknown))}; known are {', '.join(sorted(STATISTICS))}."
        )
    return [STATISTICS[name] for name in names]


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
