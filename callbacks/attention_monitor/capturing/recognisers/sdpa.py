"""Attention by ``torch.nn.functional.scaled_dot_product_attention``.

Shapes: B sequences, H query heads, H_kv key heads, Q queries, K keys, D head dimensions, R rows of a block.
"""

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..attention_call import AttentionCall, NotUnderstoodError
from .base import FunctionCall, Recogniser, as_computed
from .fused import read_fused


class ScaledDotProduct(Recogniser):
    """``torch.nn.functional.scaled_dot_product_attention``."""

    functions = (F.scaled_dot_product_attention,)
    reads = "scaled_dot_product_attention"

    def read(self, call: FunctionCall) -> AttentionCall:
        return self._read(call, *call.args, **call.kwargs)

    def _read(
        self,
        call: FunctionCall,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> AttentionCall:
        if query.is_nested or key.is_nested:
            raise NotUnderstoodError("its queries and keys are nested tensors; pad them and give a mask")
        origins = call.origins
        q_layout, k_layout = origins.layout_of(query), origins.layout_of(key)
        q_origin, k_origin = origins.of(query), origins.of(key)
        query, key = as_computed(query.detach()), as_computed(key.detach())
        value = as_computed(value.detach())
        scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        mask = None
        if attn_mask is not None:
            # torch.nn.attention.bias: a tensor in name only
            materialize = getattr(attn_mask, "_materialize", None)
            mask = materialize(query.device) if materialize else attn_mask.detach()
            mask = mask.reshape((1,) * (query.dim() - mask.dim()) + mask.shape)
        return read_fused(
            call,
            (query, q_origin, q_layout),
            (key, k_origin, k_layout),
            value,
            mask,
            grouped=enable_gqa,
            is_causal=is_causal,
            scale=scale,
        )
