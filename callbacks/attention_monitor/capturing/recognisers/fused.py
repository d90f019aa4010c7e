"""Queries, keys and values of a fused call, brought into one order of axes.

Shapes: B sequences, H query heads, H_kv key heads, Q queries, K keys, D head dimensions.
"""

import math
from typing import Any

import torch
from torch import Tensor

from ..attention_call import AttentionCall, NotUnderstoodError
from ..axes import Axis, Layout, Part, SourceKind, is_features
from ..products import best_axis
from ..provenance import Origin
from ..roles import Roles, of_fused
from .base import FunctionCall

Given = tuple[Tensor, Origin, Layout]


def read_fused(
    call: FunctionCall,
    query: Given,
    key: Given,
    value: Tensor,
    mask: Tensor | None,
    *,
    grouped: bool = False,
    **options: Any,
) -> AttentionCall:
    """Return the attention call of queries (..., Q, D) and keys (..., K, D), whatever their leading axes are.

    Args:
        call: the call.
        query: queries, where they come from, what their axes are made of.
        key: the same of the keys.
        value: values (..., K, D_v).
        mask: with as many axes as the queries.
        grouped: whether several query heads share one of the keys.
        options: further arguments of AttentionCall.

    Raises:
        NotUnderstoodError: when heads are grouped, and merged with sequences.
    """
    (q, q_origin, q_layout), (k, k_origin, k_layout) = query, key
    same = grouped or q.shape[:-2] == k.shape[:-2]
    leading = q.shape[:-2] if same else torch.broadcast_shapes(q.shape[:-2], k.shape[:-2])  # slow: imports sympy
    n = len(leading)
    q_layout, k_layout = _aligned(q_layout, n), _aligned(k_layout, n)
    merged = [best_axis([a, b]) for a, b in zip(q_layout.axes[:-2], k_layout.axes[:-2], strict=True)]
    if grouped:
        merged = [a or b for a, b in zip(q_layout.axes[:-2], k_layout.axes[:-2], strict=True)]
    of_query = Layout((*merged, *q_layout.axes[-2:]), q_layout.fixed)
    said, first = call.said_heads, call.origins.first
    q = q.expand(*leading, -1, -1)
    roles = of_fused(of_query, k_layout, q.shape, first, said)
    rows = q_layout.axes[-2]
    if roles.own_keys:
        own = {p.source for i, p in enumerate(part for axis in merged for part in axis) if i in roles.rows}
        rows = tuple(part for part in q_layout.parts if part.source in own)
    keys = k_layout.axes[-2]
    scores: Tensor | None = None
    if is_features(rows) and is_features(keys) and not _has_features(of_query, k_layout):
        relation: dict[str, Any] = {"self_attention": True, "over": "channels", "positions_known": False}
    else:
        own_rows = rows if roles.own_keys else tuple(p for p in rows if not _is_head(p, of_query, keys))
        relation = call.relation(
            (q_origin, q_layout, own_rows),
            (k_origin, k_layout, keys),
            own_keys=roles.own_keys,
            contracted=q_layout.axes[-1],
            shared=list(zip(q_layout.axes[:-2], k_layout.axes[:-2], strict=True)),
        )
    if any(_is_head(part, of_query, keys) for part in rows):  # heads and queries in one axis
        roles = _cut_rows(roles, rows, of_query, keys)
        scores = _scores(q, k.expand(*leading, -1, -1), mask, **options)
    common: dict[str, Any] = {"windows": roles.n_windows, "assumed": roles.assumed, **relation}
    if roles.own_keys:
        scores = _scores(q, k.expand(*leading, -1, -1), mask, **options)  # (..., 1, K)
        roles = _of_last(roles, scores.shape[-2:])
    if scores is not None:
        return AttentionCall("", None, None, model_scores=roles.arranged(scores), **common)
    if not grouped:
        k, value = k.expand(*leading, -1, -1), value.expand(*leading, -1, -1)
    return AttentionCall(
        "",
        roles.arranged(q),
        _of_keys(roles, q, k).arranged(k),
        None if mask is None else _arranged_mask(roles, mask, q),
        value=_of_keys(roles, q, value).arranged(value),
        **common,
        **options,
    )


def _is_head(part: Part, query: Layout, keys: Axis) -> bool:
    """Whether a part of the axis of queries is heads: of the projection that is summed over, and not of the keys."""
    of_head = {part.source for part in query.axes[-1]}
    return part.source.kind is SourceKind.FEATURES and part.source in of_head - {p.source for p in keys}


def _cut_rows(roles: Roles, rows: Axis, query: Layout, keys: Axis) -> Roles:
    """Return the roles of scores whose axis of queries is cut into heads and queries."""
    n = len(roles.sizes) - 2
    K = math.prod(part.size for part in keys)
    heads = [n + i for i, part in enumerate(rows) if _is_head(part, query, keys)]
    others = [n + i for i in range(len(rows)) if n + i not in heads]
    sizes = [*roles.sizes[:n], *(part.size for part in rows), K]
    return Roles(
        sizes, roles.samples, roles.windows, [*roles.heads, *heads], others, [len(sizes) - 1], assumed=roles.assumed
    )


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, is_causal: bool, scale: float) -> Tensor:
    """Compute the scores of queries that have keys of their own, (..., 1, K)."""
    scores = scale * (q.float() @ k.float().mT)
    if is_causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], device=q.device).tril() == 0, -torch.inf)
    if mask is not None:
        hidden = mask.dtype == torch.bool
        scores = scores.masked_fill(~mask, -torch.inf) if hidden else scores + mask
    return scores


def _aligned(layout: Layout, n: int) -> Layout:
    """Return the layout with n leading axes."""
    return Layout((*[()] * (n + 2 - len(layout.axes)), *layout.axes), layout.fixed)


def _has_features(query: Layout, key: Layout) -> bool:
    return is_features(query.axes[-1]) or is_features(key.axes[-1])


def _of_last(roles: Roles, last: torch.Size) -> Roles:
    """Return the roles of a tensor with the leading axes of the queries and two others of its own."""
    sizes = [*roles.sizes[:-2], *last]
    return Roles(sizes, roles.samples, roles.windows, roles.heads, roles.rows, roles.columns)


def _of_keys(roles: Roles, q: Tensor, x: Tensor) -> Roles:
    """Return the roles of keys or values; they may have fewer heads than the queries.

    Raises:
        NotUnderstoodError: when heads are grouped, and are no axis of their own.
    """
    if q.shape[:-2] == x.shape[:-2]:
        return _of_last(roles, x.shape[-2:])
    first, last = len(roles.sizes) - 2 - len(roles.heads), len(roles.sizes) - 2
    H = math.prod(roles.sizes[i] for i in roles.heads)
    if q.shape[:-3] != x.shape[:-3] or H != q.shape[-3] or roles.heads != list(range(first, last)):
        raise NotUnderstoodError("its heads are grouped, and cannot be told apart from its sequences")
    sizes = [*roles.sizes[:first], x.shape[-3], *x.shape[-2:]]
    return Roles(sizes, roles.samples, roles.windows, [first], [first + 1], [first + 2])


def _arranged_mask(roles: Roles, mask: Tensor, q: Tensor) -> Tensor:
    """Bring a mask into the order (B, H, Q, K), as small as it can stay."""
    if all(size == 1 for size in mask.shape[:-2]):
        return mask.reshape(1, 1, *mask.shape[-2:])
    if q.dim() == 4 == len(roles.sizes) and roles.is_plain:
        return mask
    return _of_last(roles, mask.shape[-2:]).arranged(mask.expand(*q.shape[:-2], -1, -1))
