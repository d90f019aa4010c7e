"""Attention by ``nn.MultiheadAttention``.

Shapes: B sequences, H query heads, H_kv key heads, Q queries, K keys, D head dimensions, R rows of a block.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention_call import AttentionCall
from ..axes import is_features
from ..roles import of_batch
from .base import FunctionCall, Recogniser


class MultiHeadAttention(Recogniser):
    """``F.multi_head_attention_forward``, which is what ``nn.MultiheadAttention`` calls.

    What it calls in turn is hidden, so queries and keys are projected once more.
    """

    functions = (F.multi_head_attention_forward,)
    reads = "nn.MultiheadAttention"

    def read(self, call: FunctionCall) -> AttentionCall:
        return self._read(call, *call.args, **call.kwargs)

    def _read(
        self,
        call: FunctionCall,
        query: Tensor,  # (Q, B, E), or (Q, E)
        key: Tensor,  # (K, B, E), or (K, E)
        value: Tensor,
        embed_dim_to_check: int,
        num_heads: int,
        in_proj_weight: Tensor | None,
        in_proj_bias: Tensor | None,
        bias_k: Tensor | None,
        bias_v: Tensor | None,
        add_zero_attn: bool,
        dropout_p: float,
        out_proj_weight: Tensor,
        out_proj_bias: Tensor | None,
        training: bool = True,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        use_separate_proj_weight: bool = False,
        q_proj_weight: Tensor | None = None,
        k_proj_weight: Tensor | None = None,
        v_proj_weight: Tensor | None = None,
        static_k: Tensor | None = None,
        static_v: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> AttentionCall:
        H = num_heads
        origins = call.origins
        q_layout, k_layout = origins.layout_of(query), origins.layout_of(key)
        q_axis, k_axis = q_layout.axes[0], k_layout.axes[0]
        relation: dict[str, Any]
        if is_features(q_axis) and is_features(k_axis) and not is_features(q_layout.axes[-1]):
            relation = {"self_attention": True, "over": "channels", "positions_known": False}
        else:
            relation = call.relation(
                (origins.of(query), q_layout, q_axis),
                (origins.of(key), k_layout, k_axis),
                projects=True,
                weight=in_proj_weight if in_proj_weight is not None else q_proj_weight,
                contracted=q_layout.axes[-1],
            )
        if query is key and relation["self_attention"] is None:
            relation["self_attention"] = True
        batch = of_batch(q_layout, q_axis, k_axis, origins.first) if query.dim() == 3 else None
        query, key, value = query.detach(), key.detach(), value.detach()
        if query.dim() == 2:
            query, key, value = query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        Q, B, E = query.shape
        if use_separate_proj_weight:
            assert q_proj_weight is not None
            assert k_proj_weight is not None
            assert v_proj_weight is not None
            weight_q, weight_k, weight_v = q_proj_weight, k_proj_weight, v_proj_weight
        else:
            assert in_proj_weight is not None
            weight_q, weight_k, weight_v = in_proj_weight.chunk(3)
        bias_of_q, bias_of_k, bias_of_v = (None, None, None) if in_proj_bias is None else in_proj_bias.chunk(3)
        q = F.linear(query, weight_q, bias_of_q).reshape(Q, B, H, E // H).permute(1, 2, 0, 3)  # (B, H, Q, D)
        if static_k is None:
            k = F.linear(key, weight_k, bias_of_k)  # (K, B, E)
            if bias_k is not None:
                k = torch.cat([k, bias_k.to(k.dtype).expand(1, B, E)])
            k = k.reshape(-1, B, H, E // H).permute(1, 2, 0, 3)  # (B, H, K, D)
        else:
            k = static_k.reshape(B, H, -1, E // H)
        if static_v is None:
            v = F.linear(value, weight_v, bias_of_v).reshape(-1, B, H, E // H).permute(1, 2, 0, 3)
        else:
            v = static_v.reshape(B, H, -1, E // H)
        if add_zero_attn:
            k = torch.cat([k, k.new_zeros(B, H, 1, E // H)], dim=2)
        n_sinks = int(bias_k is not None) + int(add_zero_attn)
        masks = []
        if attn_mask is not None:  # (Q, K) or (B * H, Q, K)
            mask = attn_mask.detach()
            masks.append(mask.reshape(B, H, *mask.shape[1:]) if mask.dim() == 3 else mask[None, None])
        if key_padding_mask is not None:  # (B, K)
            masks.append(key_padding_mask.detach()[:, None, None, :])
        attention = AttentionCall(
            "",
            q.detach(),
            k.detach(),
            _merged(masks, n_sinks),
            scale=1 / math.sqrt(E // H),
            n_sinks=n_sinks,
            sinks_in_pattern=True,
            value=v.detach(),
            **relation,
        )
        return attention if batch is None else batch.in_order(attention)


def _merged(masks: list[Tensor], n_sinks: int) -> Tensor | None:
    """Merge masks of nn.MultiheadAttention (True: hidden) into one of scaled_dot_product_attention (True: may attend).

    Args:
        masks: bool or numbers to add, broadcastable to (B, H, Q, K).
        n_sinks: keys that were appended, which everybody sees.
    """
    if not masks:
        return None
    padded = [F.pad(mask, (0, n_sinks)) for mask in masks]  # with False or 0: not hidden
    if all(mask.dtype == torch.bool for mask in padded):
        return ~torch.stack(torch.broadcast_tensors(*padded)).any(0)
    floating = [
        torch.zeros_like(mask, dtype=torch.float32).masked_fill_(mask, -torch.inf)
        if mask.dtype == torch.bool
        else mask.float()
        for mask in padded
    ]
    return torch.stack(torch.broadcast_tensors(*floating)).sum(0)
