"""AttentionCall -> one number per head, in blocks of query rows, never the whole Q x K.

A statistic is one decorated function: it gets a ``RowBlock`` and returns one number a row, (B, H, R). The engine
reduces rows to heads. Notation: ``s_ij`` score of query i and key j as the model used it, ``p_ij`` its softmax over j,
``n_i`` number of keys that row i may see.

Shapes: B sequences, H heads, R rows of a block, K keys that some row of the block may see.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .calls import AttentionCall
from .errors import AttentionMonitorError

# Scores held at a time: what is derived from a block stays in cache, and 64 rows make a matrix product worth while.
BLOCK_ELEMENTS = 3 << 20
BLOCK_ROWS = 64

# The score of a masked key within a block: exp gives exactly 0, and 0 times it is 0, which with -inf would be NaN.
_HIDDEN = -1e30


class Workspace:
    """Memory that blocks share one after the other: new memory for each costs as much as what is computed in it."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def take(self, name: str, n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """(n,), with anything in it, until the next ``take`` of the same name."""
        found = self._buffers.get((name, dtype, device))
        if found is None or len(found) < n:
            found = self._buffers[name, dtype, device] = torch.empty(n, dtype=dtype, device=device)
        return found[:n]


class RowBlock:
    """Query rows ``start`` to ``stop`` of a call against the keys they may see; what is shared is computed once.

    Attributes:
        allowed: bool, broadcastable to (B, H, R, K): which keys a row may see; last columns may be sinks, which are no
            position.
        max_score: (B, H, R) max_j s_ij.
        query_pos: (R,) position of each row.
        key_pos: (K - sinks,) position of each key that is one.
    """

    def __init__(self, call: AttentionCall, start: int, stop: int, workspace: Workspace | None = None) -> None:
        self.call, self.start, self.stop = call, start, stop
        workspace = workspace or Workspace()
        B, H, _, K = call.shape
        size = B * H * (stop - start) * (K + call.n_sinks), call.compute_dtype, call.device
        scores, self.allowed = call.scores(start, stop, workspace.take("scores", *size), _HIDDEN)  # (B, H, R, K)
        self.max_score = scores.amax(-1)
        # differences to the largest keep their digits however large the scores are
        shifted = scores.sub_(self.max_score[..., None])
        self._exp = torch.exp(shifted, out=workspace.take("exp", *size)[: shifted.numel()].view(shifted.shape))
        self._sum_exp = self._exp.sum(-1)  # (B, H, R), >= 1
        self._sum_exp_shifted = shifted.mul_(self._exp).sum(-1)
        rows, keys = scores.shape[2:]
        self._first = start + call.query_offset
        self.query_pos = torch.arange(self._first, self._first + rows, device=call.device)
        self.key_pos = torch.arange(min(keys, call.n_positions), device=call.device)
        padded = call.padded_queries  # broadcastable to (B, H, Q)
        self._padded = None if padded is None else padded[..., start:stop]

    @cached_property
    def scores(self) -> Tensor:
        """s_ij, (B, H, R, K), -inf where masked. Computed once more: not used by the statistics here."""
        return self.call.scores(self.start, self.stop)[0]

    @cached_property
    def n_keys(self) -> Tensor:
        """n_i, broadcastable to (B, H, R)."""
        return self.allowed.expand(*self.allowed.shape[:-1], self._exp.shape[-1]).sum(-1)

    @cached_property
    def lse(self) -> Tensor:
        """ln sum_j exp s_ij, (B, H, R)."""
        return self.max_score + self._sum_exp.log()

    @cached_property
    def weights(self) -> Tensor:
        """p_ij, (B, H, R, K)."""
        return self._exp / self._sum_exp[..., None]

    @cached_property
    def max_weight(self) -> Tensor:
        """max_j p_ij, (B, H, R)."""
        return 1 / self._sum_exp  # the largest of exp(s - max s) is 1

    @cached_property
    def entropy(self) -> Tensor:
        """lse_i - sum_j p_ij s_ij, (B, H, R), nats; finite exactly when q, scores and p of the row are."""
        return self._sum_exp.log() - self._sum_exp_shifted / self._sum_exp

    @cached_property
    def expected_score(self) -> Tensor:
        """sum_j p_ij s_ij, (B, H, R)."""
        return self.lse - self.entropy

    @cached_property
    def sum_of_squares(self) -> Tensor:
        """sum_j p_ij^2, (B, H, R)."""
        return (self._exp * self._exp).sum(-1) / self._sum_exp**2

    @property
    def position_weights(self) -> Tensor:
        """p_ij of the keys that are positions, (B, H, R, positions): those of ``key_pos``."""
        return self.weights[..., : self.key_pos.numel()]

    def weight_at(self, offset: int) -> Tensor:
        """p at key position i + offset of each row i, (B, H, R); 0 where there is no such key."""
        ahead = self._first + offset  # of row 0: the key stands that many columns after the diagonal
        R, n = self._exp.shape[2], self.key_pos.numel()
        before = min(R, max(0, -ahead))
        chosen = self._exp[..., :n].diagonal(ahead, -2, -1) / self._sum_exp[..., before : max(before, n - ahead)]
        return F.pad(chosen, (before, R - before - chosen.shape[-1]))

    def nonfinite(self, which: Literal["query", "key", "value"]) -> Tensor:
        """Of q the rows with NaN or infinity, of k and v the fraction of keys; (B, H, R) or (B, H, 1)."""
        found = self.call.nonfinite(which)  # (B, H, Q or K)
        if which == "query":
            return found[..., self.start : self.stop]
        return found.mean(-1, keepdim=True)

    # Which rows count, bool, broadcastable to (B, H, R); named in @statistic(rows=...)

    @cached_property
    def not_padded(self) -> Tensor:
        """Rows that are not padding."""
        every = torch.ones_like(self.n_keys, dtype=torch.bool)
        return every if self._padded is None else every & ~self._padded

    @cached_property
    def visible(self) -> Tensor:
        """Rows that see a key and are not padding."""
        return self.not_padded & (self.n_keys >= 1)

    @cached_property
    def informative(self) -> Tensor:
        """Visible rows that see at least two keys: with fewer, the pattern can only be 1 at one place."""
        return self.visible & (self.n_keys >= 2)

    @cached_property
    def informative_with_previous(self) -> Tensor:
        """Informative rows other than the first position, before which there is nothing."""
        return self.informative & (self.query_pos >= 1)


RowFunction = Callable[[RowBlock], Tensor]


@dataclass(frozen=True)
class Statistic:
    """An entry of the registry.

    Attributes:
        name: as in tags and configs.
        function: RowBlock -> (B, H, R), or what broadcasts to it; numbers, or bool for a fraction of rows.
        unit: of the value.
        range: of the value.
        reduce: how rows become a head's value.
        rows: attribute of RowBlock that says which rows count.
        self_attention_only: compares positions of queries and keys: NaN for cross-attention, and for self-attention
            to fewer keys than there are queries.
    """

    name: str
    function: RowFunction
    unit: str
    range: str
    reduce: Literal["mean", "max"]
    rows: str
    self_attention_only: bool


STATISTICS: dict[str, Statistic] = {}


def statistic(
    *,
    unit: str,
    range: str,
    reduce: Literal["mean", "max"] = "mean",
    rows: str = "informative",
    self_attention_only: bool = False,
) -> Callable[[RowFunction], RowFunction]:
    """Register a function of a RowBlock as a statistic under its own name."""

    def register(function: RowFunction) -> RowFunction:
        name = function.__name__
        if ".." not in range or not hasattr(RowBlock, rows):
            raise AttentionMonitorError(
                f"The statistic {name!r} has range={range!r}, rows={rows!r}; a range is two bounds with '..' between "
                f"them, such as '0..1' or '0..T', and rows is 'informative', 'visible' or 'not_padded'."
            )
        if name in STATISTICS and STATISTICS[name].function.__module__ != function.__module__:
            raise AttentionMonitorError(f"There is a statistic {name!r} already; give yours another name.")
        STATISTICS[name] = Statistic(name, function, unit, range, reduce, rows, self_attention_only)
        return function

    return register


@statistic(unit="nats", range="0..ln n_i")
def entropy(block: RowBlock) -> Tensor:
    """Shannon entropy of the row, -sum_j p ln p = lse_i - sum_j p_ij s_ij."""
    return block.entropy


@statistic(unit="1", range="0..1")
def normalized_entropy(block: RowBlock) -> Tensor:
    """Entropy over the most it can be, ln n_i: 1 exactly when the row is uniform over the keys it may see."""
    return block.entropy / block.n_keys.to(block.max_score.dtype).log()


@statistic(unit="1", range="0..1", self_attention_only=True)
def diagonal_mean(block: RowBlock) -> Tensor:
    """Weight on the token itself, p_ii."""
    return block.weight_at(0)


@statistic(unit="1", range="0..1", rows="informative_with_previous", self_attention_only=True)
def previous_token(block: RowBlock) -> Tensor:
    """Weight on the token before, p_{i,i-1}."""
    return block.weight_at(-1)


@statistic(unit="1", range="0..1")
def first_token(block: RowBlock) -> Tensor:
    """Weight on the first key, p_{i,0}: the mass of an attention sink (Xiao et al. 2023; Gu et al. 2024)."""
    return block._exp[..., 0] / block._sum_exp


@statistic(unit="keys", range="1..n_i")
def effective_keys(block: RowBlock) -> Tensor:
    """How many keys the weight is spread over, 1 / sum_j p_ij^2: n_i for a uniform row, 1 for a one-hot row."""
    return 1 / block.sum_of_squares


@statistic(unit="tokens", range="0..T", self_attention_only=True)
def mean_distance(block: RowBlock) -> Tensor:
    """How far the row looks, sum_j p_ij |i - j|."""
    distance = (block.query_pos[:, None] - block.key_pos).abs().to(block.max_score.dtype)  # (R, positions)
    return (block.position_weights * distance).sum(-1)


@statistic(unit="fraction of keys", range="0..1")
def sparsity(block: RowBlock, threshold: float = 0.1) -> Tensor:
    """Keys that the row may see and gives less than ``threshold`` of its weight, p_ij < 0.1."""
    n_small = ((block.weights < threshold) & block.allowed).sum(-1)
    return n_small / block.n_keys


@statistic(unit="1", range="0..0.5")
def weight_std(block: RowBlock) -> Tensor:
    """Standard deviation of p_ij over the keys that the row may see: 0 for a uniform row."""
    n = block.n_keys.to(block.max_score.dtype)
    # not by the sum of squares: close to uniform that would leave nothing but rounding
    deviation = (block.weights - 1 / n[..., None]).masked_fill(~block.allowed, 0)
    return ((deviation * deviation).sum(-1) / n).sqrt()


@statistic(unit="1", range="0..1", rows="visible", self_attention_only=True)
def future_mass(block: RowBlock) -> Tensor:
    """Weight on later tokens, sum_j p_ij for j > i: 0 in a causal model, unless its mask leaks."""
    later = block.position_weights.masked_fill(block.key_pos <= block.query_pos[:, None], 0).sum(-1)
    return later + 0 * block.entropy  # NaN for a row that has one


@statistic(unit="fraction of rows", range="0..1", rows="not_padded")
def fully_masked_rows(block: RowBlock) -> Tensor:
    """Rows that may see no key. They are in no other statistic."""
    return block.n_keys == 0


@statistic(unit="1", range="0..1")
def max_weight(block: RowBlock) -> Tensor:
    """Largest weight of the row, max_j p_ij; "confidence" in Voita et al. 2019."""
    return block.max_weight


@statistic(unit="fraction of rows", range="0..1")
def collapse_fraction(block: RowBlock, threshold: float = 0.95) -> Tensor:
    """Rows that put more than ``threshold`` of their weight on one key, max_j p_ij > 0.95."""
    return block.max_weight > threshold


@statistic(unit="score", range="-inf..inf", reduce="max", rows="visible")
def max_score(block: RowBlock) -> Tensor:
    """Largest score, max_j s_ij, and the largest over all rows: the "max attention logit" of QK-clip and QK-norm."""
    return block.max_score


@statistic(unit="fraction of rows", range="0..1", rows="visible")
def nonfinite_fraction(block: RowBlock) -> Tensor:
    """Rows with NaN or infinity in q_i, in the scores (other than masked -inf) or in p.

    Unlike the other fractions it counts rows that see a single key too: a NaN must not hide there.
    """
    return ~block.entropy.isfinite()


@statistic(unit="fraction of rows", range="0..1", rows="not_padded")
def nonfinite_query(block: RowBlock) -> Tensor:
    """Rows with NaN or infinity in q_i. Not known where the model hands on nothing but its scores."""
    return block.nonfinite("query")


@statistic(unit="fraction of keys", range="0..1", rows="not_padded")
def nonfinite_key(block: RowBlock) -> Tensor:
    """Keys with NaN or infinity in k_j. Not known where the model hands on nothing but its scores."""
    return block.nonfinite("key")


@statistic(unit="fraction of keys", range="0..1", rows="not_padded")
def nonfinite_value(block: RowBlock) -> Tensor:
    """Keys with NaN or infinity in v_j. Not known where the model hands on nothing but its scores."""
    return block.nonfinite("value")


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

    Attributes:
        packed: (2, statistics, H), float64: sums or maxima of the rows that count, and how many those are; None before
            the first call.
    """

    def __init__(
        self, statistics: Iterable[Statistic], max_rows: int | None = None, workspace: Workspace | None = None
    ) -> None:
        self.statistics, self.max_rows = list(statistics), max_rows
        self.packed: Tensor | None = None
        self._workspace = workspace or Workspace()

    def add(self, call: AttentionCall) -> None:
        """Take in the rows of a call."""
        if not self.statistics:
            return
        B, H, _, _ = call.shape
        spans = list(_spans(call, self.max_rows))
        Q = sum(stop - start for start, stop in spans)
        rows = torch.zeros((len(self.statistics), B, H, Q), dtype=call.compute_dtype, device=call.device)
        selectors = list(dict.fromkeys(stat.rows for stat in self.statistics))
        counted = torch.zeros((len(selectors), B, H, Q), dtype=torch.bool, device=call.device)
        end = 0
        for start, stop in spans if 0 not in call.shape else ():
            block = RowBlock(call, start, stop, self._workspace)
            here, end = slice(end, end + stop - start), end + stop - start
            for i, stat in enumerate(self.statistics):
                if call.has_positions or not stat.self_attention_only:
                    rows[i, :, :, here] = stat.function(block)
            for i, selector in enumerate(selectors):
                counted[i, :, :, here] = getattr(block, selector)
        absent = [stat.self_attention_only and not call.has_positions for stat in self.statistics]
        counted = counted[[selectors.index(stat.rows) for stat in self.statistics]]  # as rows
        counted[absent] = False
        self.merge(_packed(self.statistics, rows, counted))

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


def _spans(call: AttentionCall, max_rows: int | None) -> Iterator[tuple[int, int]]:
    """First row, and row after the last, of each block."""
    Q, n = call.shape[2], rows_per_block(call)
    if max_rows is None or max_rows >= Q:
        yield from ((start, min(start + n, Q)) for start in range(0, Q, n))
        return
    n = min(n, max_rows)
    wanted = max_rows // n
    for i in range(wanted):
        start = (Q - n) * (2 * i + 1) // (2 * wanted)
        yield start, start + n


def _packed(statistics: Sequence[Statistic], rows: Tensor, counted: Tensor) -> Tensor:
    """(2, statistics, H) totals and counts of rows and whether they count, both (statistics, B, H, Q)."""
    sums = rows.masked_fill(~counted, 0).sum((1, 3), dtype=torch.float64)
    counts = counted.sum((1, 3), dtype=torch.float64)
    packed = torch.stack([sums, counts])
    for i, stat in enumerate(statistics):
        if stat.reduce == "max":
            packed[0, i] = rows[i].masked_fill(~counted[i], -torch.inf).amax((0, 2)) if rows[i].numel() else -torch.inf
    return packed


def _takes_maximum(statistics: Sequence[Statistic], packed: Tensor) -> Tensor:
    """Which of (2, statistics, 1) are maxima and not sums."""
    is_max = torch.tensor([stat.reduce == "max" for stat in statistics], device=packed.device)
    return torch.stack([is_max, torch.zeros_like(is_max)])[..., None]


def rows_per_block(call: AttentionCall) -> int:
    """As many rows as BLOCK_ELEMENTS allow; of those no more than BLOCK_ROWS, unless rows are short."""
    B, H, _, K = call.shape
    most = max(1, BLOCK_ELEMENTS // max(1, B * H * K))
    return most if call.device.type != "cpu" else min(most, max(BLOCK_ROWS, most // 4))


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


@dataclass(frozen=True)
class Snapshot:
    """What was seen at one step from one source.

    Attributes:
        step: optimizer steps done before it.
        source: ``live`` or the probe's name.
        labels: one for each site, in order of execution: ``L00`` or a module path.
        sites: module paths; those of a stack stand together.
        values: for each site, statistic -> (H,).
        patterns: for each site (H, Q, K) of one sequence, possibly pooled; empty if none was asked for.
        tokens: labels of the positions, where known and not pooled.
        stacks: for each site the stack of layers it belongs to, such as ``decoder.layers.*.self_attn``.
        is_cross: for each site whether it is cross-attention, for which some statistics are NaN.
    """

    step: int
    source: str
    labels: list[str]
    sites: list[str]
    values: list[dict[str, Tensor]]
    patterns: list[Tensor] = field(default_factory=list)
    tokens: list[str] | None = None
    stacks: list[str] = field(default_factory=list)
    is_cross: list[bool] = field(default_factory=list)

    def mean(self, statistic: str, stack: str | None = None) -> float:
        """Mean over all heads, or those of a stack, that have a value; NaN if none has."""
        stacks: Sequence[str | None] = self.stacks or [None] * len(self.values)
        heads = [v[statistic] for v, of in zip(self.values, stacks, strict=True) if stack in (None, of)]
        return float(torch.cat(heads).nanmean()) if heads else math.nan
