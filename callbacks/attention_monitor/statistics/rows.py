"""What statistics read of each query row: a few numbers.

Notation: ``s_ij`` is the score of query i and key j as the model used it, ``p_ij`` its softmax over j, ``n_i`` the
number of keys that row i may see. Shapes: B sequences, H heads, R rows, K keys that some of the rows may see.
"""

from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from ..capturing.attention_call import AttentionCall
from ..errors import AttentionMonitorError

# Numbers that are kept of each row: the first three always, the others where a statistic needs them.
ALWAYS_COMPUTED = ("max_score", "sum_exp", "sum_exp_shifted")
ROW_FILTERS = ("informative", "informative_with_previous", "visible", "not_padded")
QUANTITIES = (
    *ALWAYS_COMPUTED,
    "own_weight",
    "previous_weight",
    "first_weight",
    "later_weight",
    "sum_of_squares",
    "distance",
)


class Rows:
    """A few numbers of each of some query rows of a call.

    Attributes:
        call: attention call of the rows.
        row: (R,) number of each row.
        query_pos: (R,) position of each row among the keys.
        n_keys: n_i, broadcastable to (B, H, R).
        max_score: max_j s_ij, (B, H, R), as all that follow.
        sum_exp: sum_j exp(s_ij - max_j s_ij), 1 or more.
        sum_exp_shifted: sum_j exp(s_ij - max_j s_ij) (s_ij - max_j s_ij), 0 or less.
        own_weight: p_ii; 0 where there is no such key.
        previous_weight: p_{i,i-1}; 0 where there is no such key.
        first_weight: p_{i,0}.
        later_weight: sum_j p_ij over j > i.
        sum_of_squares: sum_j p_ij^2.
        distance: sum_j p_ij |i - j|.

    Example:
        >>> from attention_monitor import RowBlock  # rows with all their weights
        >>> call = AttentionCall("a", torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 2), is_causal=True)
        >>> RowBlock(call, 0, 4).own_weight[0, 0, ::3].tolist()
        [1.0, 0.25]
    """

    def __init__(self, call: AttentionCall, row: Tensor, n_keys: Tensor, quantities: dict[str, Tensor]) -> None:
        self.call, self.row, self.n_keys = call, row, n_keys
        self.query_pos = call.positions_of(row)
        vars(self).update(quantities)

    def __getattr__(self, name: str) -> Tensor:
        if name in QUANTITIES:
            raise AttentionMonitorError(f"A statistic reads {name!r}: say so in @statistic(needs=[{name!r}]).")
        raise AttributeError(
            f"{name!r} is not among the numbers of a row; a statistic that reads weights or scores leaves out needs=."
        )

    @cached_property
    def lse(self) -> Tensor:
        """ln sum_j exp s_ij, (B, H, R)."""
        return self.max_score + self.sum_exp.log()

    @cached_property
    def max_weight(self) -> Tensor:
        """max_j p_ij, (B, H, R)."""
        return 1 / self.sum_exp  # the largest of exp(s - max s) is 1

    @cached_property
    def entropy(self) -> Tensor:
        """lse_i - sum_j p_ij s_ij, (B, H, R), nats; finite exactly when q, scores and p of the row are."""
        return self.sum_exp.log() - self.sum_exp_shifted / self.sum_exp

    @cached_property
    def is_finite(self) -> Tensor:
        """Whether q, scores and p of the row are finite, bool (B, H, R)."""
        weights = self.call.model_weights
        finite = self.entropy.isfinite() if weights is None else weights[:, :, self.row].isfinite().all(-1)
        return finite & ~(self.nonfinite("query") > 0)  # an infinite query may have finite scores after a soft cap

    @cached_property
    def expected_score(self) -> Tensor:
        """sum_j p_ij s_ij, (B, H, R)."""
        return self.lse - self.entropy

    def nonfinite(self, which: Literal["query", "key", "value"]) -> Tensor:
        """Return where there is NaN or infinity in queries, keys or values.

        Returns:
            Of ``query`` (B, H, R), 1 for each row that has any. Of ``key`` and ``value`` (B, H, 1), the fraction of
            keys that have any.
        """
        found = self.call.nonfinite(which)  # (B, H, Q or K)
        return found[..., self.row] if which == "query" else found.mean(-1, keepdim=True)

    # ROW_FILTERS: which rows count, as @statistic(rows=...) names them. Each is bool, broadcastable to (B, H, R).

    @cached_property
    def not_padded(self) -> Tensor:
        """Rows that are not padding."""
        padded = self.call.padded_queries  # broadcastable to (B, H, Q)
        every = torch.ones_like(self.n_keys, dtype=torch.bool)
        return every if padded is None else every & ~padded[..., self.row]

    @cached_property
    def visible(self) -> Tensor:
        """Rows that see a key and are not padding."""
        return self.not_padded & (self.n_keys >= 1)

    @cached_property
    def informative(self) -> Tensor:
        """Rows that see at least two keys and are not padding: with fewer, the pattern can only be 1 at one place."""
        return self.visible & (self.n_keys >= 2)

    @cached_property
    def informative_with_previous(self) -> Tensor:
        """Rows that see at least two keys, are not padding and have a token before them."""
        return self.informative & (self.query_pos >= 1)


class RowColumns(dict[str, Tensor]):
    """Numbers of rows, collected block after block: name -> (..., R) for the rows of all blocks.

    The tensors are allocated up front: small results kept between blocks that grow would fragment the heap.

    Args:
        row: (R,) numbers of the rows of all blocks.
    """

    def __init__(self, row: Tensor) -> None:
        super().__init__()
        self._n, self._end = len(row), 0

    def add(self, of_block: dict[str, Tensor]) -> None:
        """Append the numbers of the next block, name -> (..., rows of the block)."""
        n = 0
        for name, numbers in of_block.items():
            n = numbers.shape[-1]
            if name not in self:
                self[name] = numbers.new_empty((*numbers.shape[:-1], self._n))
            self[name][..., self._end : self._end + n] = numbers
        self._end += n
