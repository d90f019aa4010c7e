"""Which entries of masks and scores count as masked, and what follows from them: padding, where the last query is.

Shapes: B sequences, H query heads, Q queries, K keys, R rows of a block.
"""

from collections.abc import Callable

import torch
from torch import Tensor

# Additive masks hide keys with -inf, finfo.min, -1e9 or -1e4: all of them leave a weight of exactly 0 in float32. In
# bfloat16 -1e4 is -9984.
MASKED_BELOW = -9.9e3

# Padding is looked for this many rows at a time, so that a long mask is never there as a whole, for each sequence.
_ROWS = 256


def mask_limit(scores: Tensor) -> Tensor:
    """Return the highest value of masked entries of scores (B, H, R, K), for each head: (1, H, 1, 1).

    A mask of -1e4 or less, added or filled in, leaves a wide gap below the lowest score. There is none where training
    has blown up the scores themselves to thousands; then only what no score reaches counts as masked.
    """
    lowest = max(-1e8, torch.finfo(scores.dtype).min * 0.9)
    in_gap = (scores > MASKED_BELOW / 2) & (scores < MASKED_BELOW / 4)
    return torch.where(in_gap.any(-1).any(-1).any(0)[None, :, None, None], lowest, MASKED_BELOW / 2)


def rows_of(mask: Tensor, start: int, stop: int) -> Tensor:
    """Return some rows of a mask (..., Q, K); one that is the same for all rows, (..., 1, K), is left whole."""
    return mask if mask.shape[-2] == 1 else mask[..., start:stop, :]


def visible_by(mask: Tensor) -> Tensor:
    """Return which entries a mask leaves visible: bool.

    NaN in an additive mask is a number gone wrong, not a mask.
    """
    return mask if mask.dtype == torch.bool else ~(mask <= MASKED_BELOW)


def last_visible(visible: Tensor) -> int | None:
    """Return the number of the last key that any sequence or head sees in some rows (..., K); None: they see none."""
    seen = visible.flatten(0, -2).any(0).nonzero()
    return int(seen[-1]) if len(seen) else None


def padding_of(visible: Callable[[int, int], Tensor], length: int) -> Tensor | None:
    """Find the padding of a self-attention by what its positions may see.

    A position that no row attends to is padding, provided that every other position sees itself: a mask that hides
    the diagonal of real tokens says nothing about padding.

    Args:
        visible: called with the number of the first row and of the row after the last, returns which keys they may
            see: bool, broadcastable to (B, H, R, K).
        length: number of queries and of keys.

    Returns:
        padded: bool, (B or 1, H or 1, length); None where the mask shows nothing.
    """
    seen, itself = [], []
    for start in range(0, length, _ROWS):
        n = min(_ROWS, length - start)
        rows = visible(start, start + n)[..., :length]
        rows = rows.expand(*rows.shape[:-1], length)  # (B or 1, H or 1, R or 1, K)
        seen.append(rows.any(-2))
        itself.append(rows.expand(*rows.shape[:-2], n, length).diagonal(start, -2, -1))
    padded = ~torch.stack(seen).any(0)  # (B or 1, H or 1, K)
    return padded if bool((torch.cat(itself, -1) | padded).all()) else None
