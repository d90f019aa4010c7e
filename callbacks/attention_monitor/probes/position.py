"""What heads are scored by on any input: where their weight lies."""

import torch
from torch import Tensor

from ..capturing.attention_call import AttentionCall
from ..snapshots import HeadScore
from ..statistics.row_blocks import RowBlock, row_spans
from ..traits import POSITIONAL, SINK

# mean weight on the first token; share of rows whose largest weight is at one offset
POSITION_SCORES = (
    HeadScore("sink", threshold=SINK.threshold, is_written=False),
    HeadScore("positional", threshold=POSITIONAL.threshold, is_written=False),
)

# In a shorter text uniform causal attention comes close to a sink: mean weight on the first of 9 tokens is 0.31.
MIN_TOKENS = 16


def position_scores(call: AttentionCall) -> dict[str, Tensor]:
    """Score heads by position: ``sink`` (B, H) and ``positional`` (1, H); nothing for a text that is too short to tell.

    ``sink`` is the mean weight on the first token (Gu et al. 2024); ``positional`` is the largest share of rows whose
    largest weight is at one offset (Voita et al. 2019).
    """
    B, H, Q, _ = call.shape
    K = call.n_positions
    if Q < MIN_TOKENS:
        return {}
    on_first = torch.zeros((B, H), dtype=torch.float64, device=call.device)
    n_rows = torch.zeros((B, H), dtype=torch.float64, device=call.device)
    last = max(K, int(call.positions_of(torch.arange(Q, device=call.device)).max()))  # a query may be beyond the keys
    offsets = torch.zeros((H, K + last), dtype=torch.float64, device=call.device)  # rows by key - query + last
    for start, stop in row_spans(call):
        block = RowBlock(call, start, stop)
        weights = block.position_weights  # (B, H, R, K')
        real = block.visible.expand(weights.shape[:3])
        on_first += weights[..., 0].masked_fill(~real, 0).sum(-1)
        n_rows += real.sum(-1)
        counts = block.informative.expand(weights.shape[:3]).double()
        offset = weights.argmax(-1) - block.query_pos + last  # (B, H, R)
        offsets.scatter_add_(1, offset.transpose(0, 1).flatten(1), counts.transpose(0, 1).flatten(1))
    sink = (on_first / n_rows)[n_rows.amin(1) > 0]  # without sequences that are all padding
    return {"sink": sink, "positional": (offsets.amax(-1) / offsets.sum(-1))[None]}
