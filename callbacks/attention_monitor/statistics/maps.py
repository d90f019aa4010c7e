"""AttentionCall -> a map for looking at."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..capturing.attention_call import AttentionCall
from .row_blocks import BLOCK_ELEMENTS


def picture(call: AttentionCall) -> Tensor:
    """The pattern (B, H, Q, K), or its largest weights over a grid of at most MAX_MAP_SIZE positions a side.

    Only for looking at. A long one is built a band of rows at a time: memory is O(K), not O(Q x K).
    """
    B, H, Q, K = call.shape
    if max(Q, K) <= MAX_MAP_SIZE:
        return call.pattern()
    rows, columns = min(Q, MAX_MAP_SIZE), min(K, MAX_MAP_SIZE)
    if B * H * Q * K <= BLOCK_ELEMENTS:
        return F.adaptive_max_pool2d(call.pattern(), (rows, columns))
    bands = [(Q * i // rows, -(-Q * (i + 1) // rows)) for i in range(rows)]  # as adaptive_max_pool2d has them
    return torch.cat([F.adaptive_max_pool2d(call.pattern(*band), (1, columns)) for band in bands], dim=2)


MAX_MAP_SIZE = 96  # positions in a picture; longer patterns are pooled
