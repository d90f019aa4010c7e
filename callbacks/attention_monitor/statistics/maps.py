"""AttentionCall -> a map that is small enough to look at."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..capturing.attention_call import AttentionCall
from .row_blocks import BLOCK_ELEMENTS

# Positions along a side of a picture: of a model with 12 heads, a row of maps is about as wide as a screen.
MAX_MAP_SIZE = 96


def pooled_pattern(call: AttentionCall) -> Tensor:
    """Return the pattern, pooled to at most MAX_MAP_SIZE positions a side.

    Pooling keeps the largest weight of each cell: a mean would let single bright weights of a long text vanish. It is
    for looking at alone; statistics never come from it. A long pattern is built a band of rows at a time, so that
    memory is O(K) and not O(Q x K).

    Args:
        call: attention call of B sequences, H heads, Q queries and K keys.

    Returns:
        (B, H, min(Q, MAX_MAP_SIZE), min(K, MAX_MAP_SIZE)) weights.
    """
    B, H, Q, K = call.shape
    if max(Q, K) <= MAX_MAP_SIZE:
        return call.pattern()
    rows, columns = min(Q, MAX_MAP_SIZE), min(K, MAX_MAP_SIZE)
    if B * H * Q * K <= BLOCK_ELEMENTS:
        return F.adaptive_max_pool2d(call.pattern(), (rows, columns))
    # first row, and row after the last, of each band: those that adaptive_max_pool2d would take
    bands = [(Q * i // rows, -(-Q * (i + 1) // rows)) for i in range(rows)]
    return torch.cat([F.adaptive_max_pool2d(call.pattern(*band), (1, columns)) for band in bands], dim=2)
