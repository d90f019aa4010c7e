"""Scores in which sequences and heads are one axis: how many of each there are.

Shapes: B sequences, H query heads, n = B * H, Q queries, K keys.
"""

import math
from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from .provenance import Origin

# Names that modules have for their number of heads.
_ATTRIBUTES = (
    "num_heads",
    "n_heads",
    "n_head",
    "num_attention_heads",
    "nhead",
    "heads",
    "n_local_heads",
    "nheads",
    "nh",
    "h",
)

# Between a projection and the scores there are views, norms, rotary angles and a cache: one or two dozen functions. In
# a module without a projection the way back would lead through the whole model.
_MOST_STEPS = 50


def with_heads(scores: Tensor, product: tuple[Origin, Origin] | None, modules: Sequence[nn.Module]) -> Tensor:
    """Return (B, H, Q, K) of (n, Q, K), in which sequences and heads are one axis, or which has one head.

    How many heads there are, and whether they come first, is seen on the way from the projection of the queries: in a
    tensor of more axes, in heads that are put one after the other, in the width of the projection. Or a module names
    it.

    Args:
        scores: (n, Q, K).
        product: origins of queries and keys; None: not known, and there is one head.
        modules: modules that may name their number of heads, the likeliest first.
    """
    if product is None:
        return scores.unsqueeze(1)
    n = scores.shape[0]
    query, key = product
    way = list(_to_projection(query if query.is_data else key))
    source = next((parent.shape for parent in way[-1].parents if parent.is_data), way[-1].shape)
    batch_sizes = set(source[:2]) if len(source) > 2 else {1}
    for origin in way:
        if (sizes := _pieces(origin, n)) is not None:
            return scores.unflatten(0, sizes).transpose(0, 1)
        if len(origin.shape) == 4 and origin.shape[0] * origin.shape[1] == n:
            first, second = origin.shape[:2]
            split = scores.unflatten(0, (first, second))
            return split.transpose(0, 1) if first not in batch_sizes and second in batch_sizes else split
    named = [getattr(module, name, None) for module in modules for name in _ATTRIBUTES]
    one = [1] if n == (source[0] if len(source) > 2 else 1) else []
    for H in (*named, *one, *_numbers_by_width(way)):
        if isinstance(H, int) and H > 0 and n % H == 0 and n // H in batch_sizes:
            return scores.unflatten(0, (n // H, H))
    return scores.unsqueeze(1)


def _pieces(origin: Origin, n: int) -> tuple[int, int] | None:
    """Return (H, B) where heads have been put one after the other along the batch, each a tensor of its own."""
    pieces = [parent for parent in origin.parents if parent.is_data]
    if len(pieces) > 1 and n % len(pieces) == 0 and all(piece.shape[0] * len(pieces) == n for piece in pieces):
        return len(pieces), n // len(pieces)
    return None


def _numbers_by_width(way: Sequence[Origin]) -> list[int]:
    """List the numbers of heads by which a projection may be as wide as it is: of q alone, of q, k, v, or of two."""
    width = way[0].shape[-1]
    widths = [origin.shape[-1] for origin in way if origin.shape and origin.shape[-1] > width]
    return [w // width // share for w in widths for share in (1, 3, 2) if w % (width * share) == 0]


def _to_projection(origin: Origin) -> Iterator[Origin]:
    """Go from a tensor back to the projection that it comes from, along what has most entries."""
    for _ in range(_MOST_STEPS):
        yield origin
        parents = [parent for parent in origin.parents if parent.is_data]
        if origin.is_projection or not parents:
            return
        origin = max(parents, key=lambda parent: math.prod(parent.shape))
