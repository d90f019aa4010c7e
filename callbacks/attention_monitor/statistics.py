"""AttentionCall -> one number per head, in blocks of query rows, never the whole Q x K.

A statistic is one decorated function: it gets a ``RowBlock`` and returns one number a row, (B, H, R). The engine
reduces rows to heads. Notation: ``s_ij`` score of query i and key j as the model used it, ``p_ij`` its softmax over j,
``n_i`` number of keys that row i may see.

Shapes: B sequences, H heads, R rows of a block, K keys that some row of the block may see.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from .calls import AttentionCall
from .errors import AttentionMonitorError

# Scores held at a time: 4 MB in float32, so that a block and what is derived from it stay in cache.
BLOCK_ELEMENTS = 1 << 20


class RowBlock:
    """Query rows ``start`` to ``stop`` of a call against the keys they may see; what is shared is computed once.

    Attributes:
        scores: (B, H, R, K), -inf where masked; last columns may be sinks, which are no position.
        allowed: bool, broadcastable to ``scores``.
        query_pos: (R,) position of each row.
        key_pos: (K - sinks,) position of each key that is one.
    """

    def __init__(self, call: AttentionCall, start: int, stop: int) -> None:
        self.scores, self.allowed = call.scores(start, stop)
        rows, keys = self.scores.shape[2:]
        first = start + call.query_offset
        self.query_pos = torch.arange(first, first + rows, device=self.scores.device)
        self.key_pos = torch.arange(min(keys, call.n_positions), device=self.scores.device)
        padded = call.padded_queries  # broadcastable to (B, H, Q)
        self._padded = None if padded is None else padded[..., start:stop]

    @cached_property
    def n_keys(self) -> Tensor:
        """n_i, broadcastable to (B, H, R)."""
        return self.allowed.expand(*self.allowed.shape[:-1], self.scores.shape[-1]).sum(-1)

    @cached_property
    def max_score(self) -> Tensor:
        """max_j s_ij, (B, H, R)."""
        return self.scores.amax(-1)

    @cached_property
    def _shifted(self) -> Tensor:  # s_ij - max_j s_ij: differences keep their digits however large the scores are
        return self.scores - self.max_score[..., None]

    @cached_property
    def _exp(self) -> Tensor:
        return self._shifted.exp()

    @cached_property
    def _sum_exp(self) -> Tensor:  # >= 1
        return self._exp.sum(-1)

    @cached_property
    def lse(self) -> Tensor:
        """ln sum_j exp s_ij, (B, H, R)."""
        return self.max_score + self._sum_exp.log()

    @cached_property
    def weights(self) -> Tensor:
        """p_ij, (B, H, R, K)."""
        return self._exp / self._sum_exp[..., None]

    @cached_property
    def entropy(self) -> Tensor:
        """lse_i - sum_j p_ij s_ij, (B, H, R), nats; finite exactly when q, scores and p of the row are."""
        shifted = self._shifted.masked_fill(~self.allowed, 0)
        return self._sum_exp.log() - (self._exp * shifted).sum(-1) / self._sum_exp

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
        key = self.query_pos + offset
        exists = (key >= 0) & (key < self.key_pos.numel())
        row = torch.arange(key.numel(), device=key.device)
        chosen = self._exp[:, :, row, key.clamp(0, self.key_pos.numel() - 1)] / self._sum_exp
        return chosen.masked_fill(~exists, 0)

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
        function: RowBlock -> (B, H, R).
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
    return block.entropy / block.n_keys.to(block.scores.dtype).log()


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
    distance = (block.query_pos[:, None] - block.key_pos).abs().to(block.scores.dtype)  # (R, positions)
    return (block.position_weights * distance).sum(-1)


@statistic(unit="fraction of keys", range="0..1")
def sparsity(block: RowBlock, threshold: float = 0.1) -> Tensor:
    """Keys that the row may see and gives less than ``threshold`` of its weight, p_ij < 0.1."""
    n_small = ((block.weights < threshold) & block.allowed).sum(-1)
    return n_small / block.n_keys


@statistic(unit="1", range="0..0.5")
def weight_std(block: RowBlock) -> Tensor:
    """Standard deviation of p_ij over the keys that the row may see: 0 for a uniform row."""
    n = block.n_keys.to(block.scores.dtype)
    return (block.sum_of_squares / n - 1 / n**2).clamp(min=0).sqrt()


@statistic(unit="1", range="0..1", rows="visible", self_attention_only=True)
def future_mass(block: RowBlock) -> Tensor:
    """Weight on later tokens, sum_j p_ij for j > i: 0 in a causal model, unless its mask leaks."""
    later = block.position_weights.masked_fill(block.key_pos <= block.query_pos[:, None], 0).sum(-1)
    return later + 0 * block.entropy  # NaN for a row that has one


@statistic(unit="fraction of rows", range="0..1", rows="not_padded")
def fully_masked_rows(block: RowBlock) -> Tensor:
    """Rows that may see no key. They are in no other statistic."""
    return (block.n_keys == 0).to(block.scores.dtype)


@statistic(unit="1", range="0..1")
def max_weight(block: RowBlock) -> Tensor:
    """Largest weight of the row, max_j p_ij; "confidence" in Voita et al. 2019."""
    return 1 / block._sum_exp  # the largest of exp(s - max s) is 1


@statistic(unit="fraction of rows", range="0..1")
def collapse_fraction(block: RowBlock, threshold: float = 0.95) -> Tensor:
    """Rows that put more than ``threshold`` of their weight on one key, max_j p_ij > 0.95."""
    return (max_weight(block) > threshold).to(block.scores.dtype)


@statistic(unit="score", range="-inf..inf", reduce="max", rows="visible")
def max_score(block: RowBlock) -> Tensor:
    """Largest score, max_j s_ij, and the largest over all rows: the "max attention logit" of QK-clip and QK-norm."""
    return block.max_score


@statistic(unit="fraction of rows", range="0..1", rows="visible")
def nonfinite_fraction(block: RowBlock) -> Tensor:
    """Rows with NaN or infinity in q_i, in the scores (other than masked -inf) or in p.

    Unlike the other fractions it counts rows that see a single key too: a NaN must not hide there.
    """
    return (~block.entropy.isfinite()).to(block.scores.dtype)


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
    """Running totals over row blocks and calls of one site; ``values`` turns them into one number per head."""

    def __init__(self, statistics: Iterable[Statistic]) -> None:
        self.statistics = list(statistics)
        self._n_heads = 0
        self._totals: dict[str, Tensor] = {}  # (H,) float64: sum or maximum
        self._counts: dict[str, Tensor] = {}  # (H,) float64: rows that count

    def add(self, call: AttentionCall) -> None:
        """Take in all rows of a call."""
        B, H, Q, K = call.shape
        self._n_heads = H
        if not self.statistics or 0 in call.shape:
            return
        n = max(1, BLOCK_ELEMENTS // (B * H * K))
        for start in range(0, Q, n):
            block = RowBlock(call, start, min(start + n, Q))
            for stat in self.statistics:
                if call.has_positions or not stat.self_attention_only:
                    rows = stat.function(block).expand(block.scores.shape[:3])
                    self._add_rows(stat, rows, getattr(block, stat.rows))

    def _add_rows(self, stat: Statistic, rows: Tensor, counts: Tensor) -> None:
        counts = counts.expand_as(rows)  # (B, H, R)
        n = counts.sum((0, 2), dtype=torch.float64)
        if stat.reduce == "max":
            total = rows.masked_fill(~counts, -torch.inf).amax((0, 2)).double()
            previous = self._totals.get(stat.name)
            total = total if previous is None else torch.maximum(previous, total)
        else:
            total = rows.masked_fill(~counts, 0).sum((0, 2), dtype=torch.float64) + self._totals.get(stat.name, 0)
        self._totals[stat.name] = total
        self._counts[stat.name] = n + self._counts.get(stat.name, 0)

    def values(self) -> dict[str, Tensor]:
        """statistic -> (H,) float32 on the CPU; NaN where no row counted."""
        result = {}
        for stat in self.statistics:
            if stat.name not in self._totals:
                result[stat.name] = torch.full((self._n_heads,), torch.nan, dtype=torch.float32, device="cpu")
                continue
            total, count = self._totals[stat.name].cpu(), self._counts[stat.name].cpu()
            value = total / count if stat.reduce == "mean" else total
            result[stat.name] = value.where(count > 0, torch.nan).float()
        return result


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
