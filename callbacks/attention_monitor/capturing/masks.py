"""Which entries of masks and scores count as masked."""

import torch
from torch import Tensor

# Additive masks hide keys with -inf, finfo.min, -1e9 or -1e4: all of them leave a weight of exactly 0 in float32. In
# bfloat16 -1e4 is -9984.
MASKED_BELOW = -9.9e3


def mask_limit(scores: Tensor) -> Tensor:
    """Highest value of masked entries of scores (B, H, R, K), for each head: (1, H, 1, 1).

    A mask of -1e4 or less, added or filled in, leaves a wide gap below the lowest score. There is none where training
    has blown up the scores themselves to thousands; then only what no score reaches counts as masked.
    """
    lowest = max(-1e8, torch.finfo(scores.dtype).min * 0.9)
    in_gap = (scores > MASKED_BELOW / 2) & (scores < MASKED_BELOW / 4)
    return torch.where(in_gap.any(-1).any(-1).any(0)[None, :, None, None], lowest, MASKED_BELOW / 2)
