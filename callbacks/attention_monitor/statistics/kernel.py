"""A Triton kernel for GPUs: the quantities of ``Rows`` in one pass over the keys, without scores in memory.

Nothing imports it where triton is not installed; torch's builds for CUDA bring it along.
"""

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..capturing.attention_call import AttentionCall
from ..capturing.masks import MASKED_BELOW
from .row_blocks import HIDDEN
from .rows import QUANTITIES, Rows

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_HIDDEN, _MASKED_BELOW = tl.constexpr(HIDDEN), tl.constexpr(MASKED_BELOW)


@triton.jit
def _rows_kernel(
    q_ptr, k_ptr, mask_ptr, row_ptr, out_ptr,
    q_b, q_h, q_i, q_d, k_b, k_h, k_j, k_d, m_b, m_h, m_i, m_j,
    H, group, R, K, D, offset, scale,
    CAUSAL: tl.constexpr, MASK: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Store QUANTITIES in their order, then the number of keys that a row may see.

    MASK: 0 none, 1 bool (True: may attend), 2 added to the score. WIDEN: multiply in float32.
    """
    of_head = tl.program_id(0).to(tl.int64)  # a mask may have more entries than 32 bits count
    b, h = of_head // H, of_head % H
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.arange(0, BLOCK_D)
    row = tl.load(row_ptr + r, mask=r < R, other=0)  # (BLOCK_R,)
    position = row + offset
    q = tl.load(
        q_ptr + b * q_b + h * q_h + row[:, None] * q_i + d[None, :] * q_d,
        mask=(r < R)[:, None] & (d < D)[None, :], other=0.0,
    )  # fmt: skip

    top = tl.full((BLOCK_R,), _HIDDEN, tl.float32)  # largest score so far
    # sums over the keys so far, with e = exp(s - top): of e, of e (s - top), of e^2, of e |i - j|, of e where j > i
    total = tl.zeros((BLOCK_R,), tl.float32)
    shifted = tl.zeros((BLOCK_R,), tl.float32)
    squares = tl.zeros((BLOCK_R,), tl.float32)
    distance = tl.zeros((BLOCK_R,), tl.float32)
    later = tl.zeros((BLOCK_R,), tl.float32)
    own = tl.full((BLOCK_R,), _HIDDEN, tl.float32)  # score of the token itself; then of those before and first
    previous = tl.full((BLOCK_R,), _HIDDEN, tl.float32)
    first = tl.full((BLOCK_R,), _HIDDEN, tl.float32)
    n_keys = tl.zeros((BLOCK_R,), tl.float32)
    has_nan = tl.zeros((BLOCK_R,), tl.int32)

    stop = K
    if CAUSAL:
        stop = tl.minimum(K, tl.max(row, 0) + 1)
    for start in range(0, stop, BLOCK_K):
        j = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
        k = tl.load(
            k_ptr + b * k_b + (h // group) * k_h + j[None, :] * k_j + d[:, None] * k_d,
            mask=(j < K)[None, :] & (d < D)[:, None], other=0.0,
        )  # fmt: skip
        if WIDEN:
            s = tl.dot(q.to(tl.float32), k.to(tl.float32), input_precision="ieee") * scale  # (BLOCK_R, BLOCK_K)
        else:
            s = tl.dot(q, k, input_precision="ieee") * scale  # (BLOCK_R, BLOCK_K)
        there = (j < K)[None, :] & (r < R)[:, None]
        if CAUSAL:
            there = there & (j[None, :] <= row[:, None])
        allowed = there
        if MASK > 0:
            at = mask_ptr + b * m_b + h * m_h + row[:, None] * m_i + j[None, :] * m_j
            if MASK == 1:
                visible = tl.load(at, mask=there, other=0) != 0
                s = s + tl.where(visible, 0.0, _HIDDEN)  # added, not replaced: NaN stays NaN, as in SDPA
                allowed = allowed & visible
            else:
                added = tl.load(at, mask=there, other=0.0).to(tl.float32)
                s = s + tl.where(added < _HIDDEN, _HIDDEN, added)
                allowed = allowed & ~(added <= _MASKED_BELOW)
        s = tl.where(there, s, _HIDDEN)
        n_keys += tl.sum(allowed.to(tl.float32), 1)
        has_nan = tl.maximum(has_nan, tl.max((s != s).to(tl.int32), 1))

        new_top = tl.maximum(top, tl.max(s, 1))
        keep = tl.exp(top - new_top)
        # the largest score has grown: every s - top so far is smaller by the same amount
        shifted = keep * (shifted + (top - new_top) * total)
        difference = s - new_top[:, None]
        e = tl.exp(difference)
        e = tl.where(there, e, 0.0)
        shifted += tl.sum(e * tl.where(there, difference, 0.0), 1)
        total = total * keep + tl.sum(e, 1)
        squares = squares * keep * keep + tl.sum(e * e, 1)
        away = position[:, None] - j[None, :]
        distance = distance * keep + tl.sum(e * tl.abs(away).to(tl.float32), 1)
        later = later * keep + tl.sum(tl.where(away < 0, e, 0.0), 1)
        own = tl.maximum(own, tl.max(tl.where(there & (away == 0), s, _HIDDEN), 1))
        previous = tl.maximum(previous, tl.max(tl.where(there & (away == 1), s, _HIDDEN), 1))
        first = tl.maximum(first, tl.max(tl.where(there & (j == 0)[None, :], s, _HIDDEN), 1))
        top = new_top

    nan = tl.where(has_nan > 0, float("nan"), 0.0)
    at = out_ptr + of_head * R + r
    step = tl.num_programs(0).to(tl.int64) * R
    tl.store(at, top + nan, mask=r < R)
    tl.store(at + step, total + nan, mask=r < R)
    tl.store(at + 2 * step, shifted + nan, mask=r < R)
    tl.store(at + 3 * step, tl.exp(own - top) / total + nan, mask=r < R)
    tl.store(at + 4 * step, tl.exp(previous - top) / total + nan, mask=r < R)
    tl.store(at + 5 * step, tl.exp(first - top) / total + nan, mask=r < R)
    tl.store(at + 6 * step, later / total + nan, mask=r < R)
    tl.store(at + 7 * step, squares / (total * total) + nan, mask=r < R)
    tl.store(at + 8 * step, distance / total + nan, mask=r < R)
    tl.store(at + 9 * step, n_keys, mask=r < R)


def supports(call: AttentionCall) -> bool:
    """Whether the kernel takes a call: queries and keys in float32 or half precision, and any mask is a tensor."""
    query, key = call.query, call.key
    if query is None or key is None or call.score_mod is not None or call.mask_mod is not None or call.n_sinks:
        return False
    is_run = call.positions_are_a_run
    return is_run and query.dtype == key.dtype and query.dtype in _DTYPES and query.shape[-1] <= 256


def rows_of(call: AttentionCall, row: Tensor) -> Rows:
    """Compute all quantities of some rows of a call.

    Args:
        call: attention call of B sequences and H heads that the kernel ``supports``.
        row: (R,) numbers of the rows, ascending.
    """
    assert call.query is not None
    assert call.key is not None
    B, H, Q, K = call.shape
    R, D = len(row), call.query.shape[-1]
    key = call.key.expand(B, -1, -1, -1)
    mask, kind = call.mask, 0
    if mask is not None:
        mask = mask.expand(B, H, Q, K)
        kind = 1 if mask.dtype == torch.bool else 2
        mask = mask.view(torch.uint8) if kind == 1 else mask
    out = torch.empty((len(QUANTITIES) + 1, B, H, R), dtype=torch.float32, device=call.device)
    block_r, block_k, block_d = 64, 64, max(16, triton.next_power_of_2(D))

    def strides(x: Tensor | None) -> tuple[Any, ...]:
        return (0, 0, 0, 0) if x is None else x.stride()

    # Triton launches on the current device, which need not be that of the tensors
    with torch.cuda.device(call.device) if call.device.type == "cuda" else nullcontext():
        _rows_kernel[(B * H, triton.cdiv(R, block_r))](
            call.query, key, out if mask is None else mask, row, out,
            *strides(call.query), *strides(key), *strides(mask),
            H, H // key.shape[1], R, K, D, call.query_offset, call.scale,
            CAUSAL=call.is_causal, MASK=kind, BLOCK_R=block_r, BLOCK_K=block_k, BLOCK_D=block_d,
            WIDEN=call.device.type == "cpu",  # Triton's interpreter takes bfloat16 for integers
        )  # fmt: skip
    return Rows(call, row, out[-1], dict(zip(QUANTITIES, out, strict=False)))
