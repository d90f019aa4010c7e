"""Attention by the kernels of flash_attn and xformers.

Shapes: B sequences, H query heads, H_kv key heads, Q queries, K keys, D head dimensions, R rows of a block.
"""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..attention_call import AttentionCall, NotUnderstoodError
from .base import FunctionCall, Recogniser


class FlashKernel(Recogniser):
    """Operators behind flash_attn and xformers; their arguments are taken by the names in their schemas."""

    functions = (
        "flash_attn::_flash_attn_forward",
        "flash_attn::_flash_attn_varlen_forward",
        "xformers_flash::flash_fwd",
        "xformers::efficient_attention_forward_cutlass",
        "aten::_flash_attention_forward",
        "aten::_efficient_attention_forward",
    )
    reads = "flash_attn, xformers"
    _NAMES: ClassVar = {
        "q": "query",
        "k": "key",
        "v": "value",
        "softmax_scale": "scale",
        "causal": "is_causal",
        "window_size_left": "window_left",
        "window_size_right": "window_right",
        "cum_seq_q": "cu_seqlens_q",
        "cum_seq_k": "cu_seqlens_k",
        "attn_bias": "bias",
    }
    _UNREADABLE = ("block_table", "block_tables", "leftpad_k", "seqused_k", "seqlen_k", "q_descale", "k_descale")

    def _arguments(self, call: FunctionCall) -> dict[str, Any]:
        """Return the arguments that were given, by one name each whatever the operator calls them."""
        overload = call.func if isinstance(call.func, torch._ops.OpOverload) else call.func.default
        names = [argument.name for argument in overload._schema.arguments]
        given = dict(zip(names, call.args, strict=False)) | call.kwargs
        given = {self._NAMES.get(name, name): value for name, value in given.items() if value is not None}
        unreadable = [name for name in self._UNREADABLE if name in given]
        if unreadable:
            raise NotUnderstoodError(f"{overload.name()} was given {', '.join(unreadable)}, which is not supported")
        return given

    def read(self, call: FunctionCall) -> AttentionCall:
        given = self._arguments(call)
        query, key = given["query"], given["key"]
        origins = call.origins
        q_layout, k_layout = origins.layout_of(query), origins.layout_of(key)  # (B, Q, H, D) or (tokens, H, D)
        relation = call.relation(
            (origins.of(query), q_layout, q_layout.axes[-3]), (origins.of(key), k_layout, k_layout.axes[-3])
        )
        query, key, value = query.detach(), key.detach(), given["value"].detach()
        if query.dim() == 3:  # all sequences one after the other: (tokens, H, D)
            query, key, value = query[None], key[None], value[None]
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # (B, H, Q, D)
        Q, K, device = query.shape[2], key.shape[2], query.device
        q_segment, q_local, q_lengths = _segments(given.get("cu_seqlens_q"), Q, device)
        k_segment, k_local, k_lengths = _segments(given.get("cu_seqlens_k"), K, device)
        # The last query is aligned with the last key. Only xformers may align the first ones: custom_mask_type 1.
        from_top = given.get("custom_mask_type", 0) == 1
        if not from_top and len(q_lengths) == len(k_lengths):
            q_local = q_local + (k_lengths - q_lengths)[q_segment]
        causal = bool(given.get("is_causal", False)) or given.get("custom_mask_type", 0) > 0
        left = given.get("window_left", -1)
        right = 0 if causal else given.get("window_right", -1)
        window = given.get("window_size", 0)  # the efficient kernel shows keys from i - window + 1 on
        left = window - 1 if window > 0 else left

        def allowed(start: int, stop: int) -> Tensor:
            distance = k_local[None] - q_local[start:stop, None]  # (R, K)
            visible = q_segment[start:stop, None] == k_segment[None]
            visible = visible & (distance <= right) if right >= 0 else visible
            visible = visible & (distance >= -left) if left >= 0 else visible
            return visible[None, None]

        softcap, slopes, bias = given.get("softcap", 0.0), given.get("alibi_slopes"), given.get("bias")

        def modify(scores: Tensor, start: int) -> Tensor:
            B, H, R, _ = scores.shape
            if softcap > 0:
                scores = softcap * (scores / softcap).tanh()
            if slopes is not None:
                distance = (k_local[None] - q_local[start : start + R, None]).abs()
                scores = scores - slopes.detach().reshape(-1, H, 1, 1)[:B] * distance
            if bias is not None:
                scores = scores + bias.detach()[:B, :, start : start + R]
            return scores

        scale = given.get("scale", 1 / math.sqrt(query.shape[-1]))
        modified = softcap > 0 or slopes is not None or bias is not None
        return AttentionCall(
            "",
            query,
            key,
            scale=scale,
            score_mod=modify if modified else None,
            mask_mod=allowed,
            value=value,
            **relation,
        )


def _segments(cu_seqlens: Tensor | None, n: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Find the segments of sequences that are packed one after the other.

    Args:
        cu_seqlens: (n_segments + 1,) where segments begin and the last one ends; None: there is one segment.
        n: number of tokens.
        device: device of the result.

    Returns:
        segment: (n,) number of the segment of each token.
        position: (n,) position of each token in its segment.
        lengths: (n_segments,) tokens of each segment.
    """
    ends = torch.tensor([0, n], device=device) if cu_seqlens is None else cu_seqlens.long()
    lengths = ends.diff()
    segment = torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths)
    return segment, torch.arange(len(segment), device=device) - ends[segment], lengths
