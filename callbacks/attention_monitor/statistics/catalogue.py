"""The statistics: one decorated function each, with its formula.

A statistic gives one number for each row, (B, H, R). It takes ``Rows`` where the few numbers that are kept of each row
are enough, and a ``RowBlock`` where it looks at weights. ``HeadTotals`` reduces rows to heads. Notation and shapes are
those of ``rows.py``. ``docs/statistics.md`` is made from the docstrings.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import AttentionMonitorError
from .registry import STATISTICS, Statistic, statistic
from .row_blocks import RowBlock
from .rows import Rows


def where_finite(values: Tensor, witness: Tensor) -> Tensor:
    """Return values of rows, with NaN in the place of those whose witness is NaN or infinite.

    A count, a comparison or a mask turns the NaN of a broken row into an ordinary number, which would let the row pass
    for a healthy one and its head's mean look fine.

    Args:
        values: (B, H, R), or what broadcasts to it; bool becomes 0 and 1.
        witness: (B, H, R) floating-point numbers of the same rows that are finite where the row is.
    """
    return torch.where(witness.isfinite(), values.to(witness.dtype), torch.nan)


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
    return where_finite(rows.n_keys.to(rows.max_score.dtype).log(), rows.entropy)


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


@statistic(unit="1", range="0..1", tokens_only=True, needs=["first_weight"])
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
    return where_finite(n_small / block.n_keys, block.entropy)


@statistic(unit="1", range="0..0.5")
def weight_std(block: RowBlock) -> Tensor:
    """Standard deviation of p_ij over the keys that the row may see: 0 for a uniform row."""
    n = block.n_keys.to(block.max_score.dtype)
    # deviations are squared, and not the weights: close to uniform, sum p^2 - 1/n would be nothing but rounding
    deviation = (block.weights - 1 / n[..., None]).masked_fill(~block.allowed, 0)
    return ((deviation * deviation).sum(-1) / n).sqrt()


@statistic(unit="1", range="0..1", rows="visible", self_attention_only=True, needs=["later_weight"])
def future_mass(rows: Rows) -> Tensor:
    """Weight on later tokens, sum_j p_ij for j > i: 0 in a causal model, unless its mask leaks."""
    return where_finite(rows.later_weight, rows.entropy)


@statistic(unit="1", range="0..1", self_attention_only=True)
def past_mass(block: RowBlock) -> Tensor:
    """Weight on earlier tokens, sum_j p_ij for j < i."""
    earlier = block.position_weights.masked_fill(block.key_pos >= block.query_pos[:, None], 0).sum(-1)
    return where_finite(earlier, block.entropy)


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
    return where_finite(rows.max_weight > threshold, rows.max_weight)


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
    return ~rows.is_finite


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


# What a training run needs to see. They cost next to nothing beside the scores themselves.
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
    """Return the registry's entries for names, in their order.

    Args:
        names: names of statistics; a string is one name.

    Raises:
        AttentionMonitorError: on a name that is not registered, or is given twice.
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
