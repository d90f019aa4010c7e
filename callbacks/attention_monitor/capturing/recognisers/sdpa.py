"""Attention by ``torch.nn.functional.scaled_dot_product_attention``.

Shapes: B sequences, H query heads, H_kv key heads, Q queries, K keys, D head dimensions, R rows of a block.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention_call import AttentionCall
from .base import FunctionCall, NotUnderstoodError, Recogniser, as_computed, four_dimensional


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
        self_attention = call.same_sequence(query, key)
        query, key = as_computed(query.detach()), as_computed(key.detach())
        scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        mask = None
        if attn_mask is not None:
            # torch.nn.attention.bias: a tensor in name only
            materialize = getattr(attn_mask, "_materialize", None)
            mask = materialize(query.device) if materialize else attn_mask.detach()
            mask = mask.reshape((1,) * (query.dim() - mask.dim()) + mask.shape)
        if not enable_gqa:  # batch and heads of either may be 1 and broadcast
            leading = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2])
            query, key = query.expand(*leading, -1, -1), key.expand(*leading, -1, -1)
        if mask is not None and query.dim() > 4:  # what is flattened together must be there
            mask = mask.expand(*query.shape[:-2], -1, -1)
        return AttentionCall(
            "",
            four_dimensional(query),
            four_dimensional(key),
            None if mask is None else four_dimensional(mask),
            is_causal,
            scale,
            self_attention=self_attention,
            value=four_dimensional(as_computed(value.detach())),
        )
