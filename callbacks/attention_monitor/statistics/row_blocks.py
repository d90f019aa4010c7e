"""AttentionCall -> blocks of query rows with all their weights, from which statistics are computed.

Notation and shapes are those of ``rows.py``.
"""

from collections.abc import Iterator
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from ..capturing.attention_call import AttentionCall
from .rows import ALWAYS_COMPUTED, Rows

# Most scores that are held at a time, and rows of a block on a CPU: what is derived from a block then stays in its
# cache, and 64 rows are enough for a matrix product to run at full speed.
BLOCK_ELEMENTS = 3 << 20
BLOCK_ROWS = 64

# Score of a masked key within a block: its exp is exactly 0, and 0 times it is 0 (with -inf that would be NaN).
HIDDEN = -1e30


class BufferPool:
    """Memory that one block after the other uses: to allocate it anew costs as much as what is computed in it."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def take(self, name: str, n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return an uninitialised buffer (n,), valid until the next ``take`` with this name."""
        found = self._buffers.get((name, dtype, device))
        if found is None or len(found) < n:
            found = self._buffers[name, dtype, device] = torch.empty(n, dtype=dtype, device=device)
        return found[:n]


class RowBlock(Rows):
    """Some query rows of a call against the keys that they may see; what statistics share is computed once.

    Args:
        call: attention call of the rows.
        start: first row.
        stop: row after the last.
        buffers: memory to share with the blocks before and after; None: memory of its own.

    Attributes:
        allowed: bool, broadcastable to (B, H, R, K), keys that a row may see; the last columns may be sinks, which
            have no position.
        key_pos: (K - sinks,) position of each key that has one.

    Example:
        >>> import torch
        >>> from attention_monitor import AttentionCall, RowBlock
        >>> query = key = torch.zeros(1, 1, 3, 8)  # (B, H, T, D): every key has the same score
        >>> block = RowBlock(AttentionCall("attn", query, key, is_causal=True), 0, 2)
        >>> block.weights  # (B, H, R, K): row 0 sees one key, row 1 two
        tensor([[[[1.0000, 0.0000],
                  [0.5000, 0.5000]]]])
        >>> block.n_keys
        tensor([1, 2])
    """

    def __init__(self, call: AttentionCall, start: int, stop: int, buffers: BufferPool | None = None) -> None:
        buffers = buffers or BufferPool()
        B, H, _, K = call.shape
        size = B * H * (stop - start) * (K + call.n_sinks), call.compute_dtype, call.device
        scores, self.allowed = call.scores(start, stop, buffers.take("scores", *size), HIDDEN)  # (B, H, R, K)
        if call.model_weights is None:
            max_score = scores.amax(-1)
            # differences to the largest keep their digits however large the scores are
            shifted = scores.sub_(max_score[..., None])
            self._exp = torch.exp(shifted, out=buffers.take("exp", *size)[: shifted.numel()].view(shifted.shape))
            sum_exp, sum_exp_shifted = self._exp.sum(-1), shifted.mul_(self._exp).sum(-1)
            self._divisor = sum_exp
        else:
            self._exp = call.pattern(start, stop)
            max_score, sum_exp, sum_exp_shifted = _of_weights(self._exp)
            self._divisor = torch.ones_like(sum_exp)
        n_keys = self.allowed.expand(*self.allowed.shape[:-1], scores.shape[-1]).sum(-1)
        always = dict(zip(ALWAYS_COMPUTED, (max_score, sum_exp, sum_exp_shifted), strict=True))
        super().__init__(call, torch.arange(start, stop, device=call.device), n_keys, always)
        self._start, self._stop = start, stop
        self.key_pos = torch.arange(min(scores.shape[-1], call.n_positions), device=call.device)

    @cached_property
    def scores(self) -> Tensor:
        """s_ij, (B, H, R, K), -inf where masked; computed anew, as the buffer of scores has been used up by then."""
        return self.call.scores(self._start, self._stop)[0]

    @cached_property
    def weights(self) -> Tensor:
        """p_ij, (B, H, R, K)."""
        return self._exp / self._divisor[..., None]

    @property
    def position_weights(self) -> Tensor:
        """p_ij of the keys that have a position, (B, H, R, K - sinks), in the order of ``key_pos``."""
        return self.weights[..., : self.key_pos.numel()]

    def weight_at(self, offset: int) -> Tensor:
        """Return p_{i,i+offset} of each row i, (B, H, R); 0 where there is no such key."""
        if not self.call.positions_are_a_run:
            key = self.query_pos + offset  # (R,)
            there = (key >= 0) & (key < self.key_pos.numel())
            at = key.clamp(0, self.key_pos.numel() - 1).expand(*self._exp.shape[:2], -1)[..., None]  # (B, H, R, 1)
            return (self._exp.gather(-1, at)[..., 0] / self._divisor).masked_fill(~there, 0)
        ahead = self._start + self.call.query_offset + offset  # columns from the diagonal to the keys
        R, n = self._exp.shape[2], self.key_pos.numel()
        before = min(R, max(0, -ahead))
        chosen = self._exp[..., :n].diagonal(ahead, -2, -1) / self._divisor[..., before : max(before, n - ahead)]
        return F.pad(chosen, (before, R - before - chosen.shape[-1]))

    @cached_property
    def own_weight(self) -> Tensor:
        return self.weight_at(0)

    @cached_property
    def previous_weight(self) -> Tensor:
        return self.weight_at(-1)

    @cached_property
    def first_weight(self) -> Tensor:
        return self._exp[..., 0] / self._divisor

    @cached_property
    def later_weight(self) -> Tensor:
        return self.position_weights.masked_fill(self.key_pos <= self.query_pos[:, None], 0).sum(-1)

    @cached_property
    def sum_of_squares(self) -> Tensor:
        return (self._exp * self._exp).sum(-1) / self._divisor**2

    @cached_property
    def distance(self) -> Tensor:
        distance = (self.query_pos[:, None] - self.key_pos).abs().to(self._exp.dtype)  # (R, positions)
        return (self.position_weights * distance).sum(-1)


def _of_weights(weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return ALWAYS_COMPUTED of rows of weights that have no scores, (B, H, R) each.

    Largest scores are NaN, and so is what entropy needs in rows that are no distribution: weights that are negative or
    do not sum to 1.
    """
    largest, total = weights.amax(-1), weights.sum(-1)
    is_distribution = (weights >= 0).all(-1) & ((total - 1).abs() <= 1e-3)
    relative = weights / largest[..., None]
    shifted = torch.special.xlogy(relative, relative).sum(-1).masked_fill(~is_distribution, torch.nan)
    return torch.full_like(largest, torch.nan), 1 / largest, shifted


def row_spans(call: AttentionCall, max_rows: int | None = None) -> Iterator[tuple[int, int]]:
    """Yield the first row, and the row after the last, of each block of a call.

    Args:
        call: attention call to cut into blocks.
        max_rows: most rows to cover, in blocks spread over the call evenly; None: all.
    """
    B, H, Q, K = call.shape
    n = max(1, BLOCK_ELEMENTS // max(1, B * H * K))
    if call.device.type == "cpu":
        n = min(n, max(BLOCK_ROWS, n // 4))  # more than BLOCK_ROWS only where rows are short
    if max_rows is None or max_rows >= Q:
        yield from ((start, min(start + n, Q)) for start in range(0, Q, n))
        return
    # eight blocks or more: in a causal model the first rows differ much from those in the middle
    n = max(1, min(n, max_rows // 8))
    wanted = max_rows // n
    for i in range(wanted):
        start = i * n + (Q - wanted * n) * (2 * i + 1) // (2 * wanted)
        yield start, start + n
