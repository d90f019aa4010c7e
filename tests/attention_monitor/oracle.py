"""The statistics again, in float64 and one row at a time, written from the formulas and apart from the package."""

import math

import numpy as np


def head_statistics(
    scores: np.ndarray, allowed: np.ndarray, padded: np.ndarray, q: np.ndarray, k: np.ndarray, v: np.ndarray
) -> dict[str, float]:
    """Statistics of one head.

    Args:
        scores: (B, Q, K) scores as the model used them, before masking.
        allowed: (B, Q, K) bool.
        padded: (B, Q) bool, rows that are padding.
        q: (B, Q, D).
        k: (B, K, D).
        v: (B, K, D).
    """
    rows: dict[str, list[float]] = {name: [] for name in NAMES}
    B, Q, K = scores.shape
    for b in range(B):
        for i in range(Q):
            keys = np.flatnonzero(allowed[b, i])
            if padded[b, i]:
                continue
            rows["fully_masked_rows"].append(float(len(keys) == 0))
            rows["nonfinite_query"].append(float(not np.isfinite(q[b, i]).all()))
            rows["nonfinite_key"].append(np.mean([not np.isfinite(key).all() for key in k[b]]))
            rows["nonfinite_value"].append(np.mean([not np.isfinite(value).all() for value in v[b]]))
            if len(keys) == 0:
                continue
            s = scores[b, i, keys].astype(np.float64)
            finite = np.isfinite(s).all()
            rows["nonfinite_fraction"].append(0.0 if finite else 1.0)
            rows["max_score"].append(s.max() if not np.isnan(s).any() else math.nan)
            p = np.full(K, math.nan)
            if finite:
                p[:] = 0
                e = np.exp(s - s.max())
                p[keys] = e / e.sum()
            if Q == K:
                rows["future_mass"].append(p[i + 1 :].sum() if finite else math.nan)
            if len(keys) < 2:
                continue
            if not finite:
                for name in NAMES:
                    if "nonfinite" not in name and name not in ("max_score", "future_mass", "fully_masked_rows"):
                        rows[name].append(math.nan)
                continue
            H = -sum(x * math.log(x) for x in p if x > 0)
            rows["entropy"].append(H)
            rows["max_entropy"].append(math.log(len(keys)))
            rows["normalized_entropy"].append(H / math.log(len(keys)))
            rows["max_weight"].append(p.max())
            rows["collapse_fraction"].append(float(p.max() > 0.95))
            rows["first_token"].append(p[0])
            rows["effective_keys"].append(1 / (p**2).sum())
            rows["sparsity"].append(float(np.mean(p[keys] < 0.1)))
            rows["weight_std"].append(np.std(p[keys]))
            if Q == K:
                rows["mean_distance"].append(sum(p[j] * abs(i - j) for j in range(K)))
                rows["diagonal_mean"].append(p[i])
                rows["past_mass"].append(p[:i].sum())
                if i > 0:
                    rows["previous_token"].append(p[i - 1])
    result = {}
    for name, values in rows.items():
        if not values:
            result[name] = math.nan
        else:
            result[name] = float(np.max(values) if name == "max_score" else np.mean(values))
    return result


NAMES = (
    "entropy",
    "max_entropy",
    "normalized_entropy",
    "diagonal_mean",
    "previous_token",
    "first_token",
    "max_weight",
    "collapse_fraction",
    "max_score",
    "nonfinite_fraction",
    "nonfinite_query",
    "nonfinite_key",
    "nonfinite_value",
    "effective_keys",
    "mean_distance",
    "sparsity",
    "weight_std",
    "future_mass",
    "past_mass",
    "fully_masked_rows",
)
