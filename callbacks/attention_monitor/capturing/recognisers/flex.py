"""Attention by ``torch.nn.attention.flex_attention``.

Shapes: B sequences, H query heads, H_kv key heads, Q queries, K keys, D head dimensions, R rows of a block.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..attention_call import AttentionCall
from ..roles import n_windows
from .base import FunctionCall, Recogniser
from .fused import read_fused


class FlexAttention(Recogniser):
    """``torch.nn.attention.flex_attention``, by the operator in which it ends."""

    functions = ("flex_attention",)
    reads = "flex_attention"

    def around(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run the flex_attention operator as it would run if nobody were watching.

        Watching makes compiled code run eagerly, and there the operator is not itself: its gradients for tensors that
        ``score_mod`` uses are lost, and it holds all scores. So it is compiled here. Where the model had compiled it,
        the default backend gives the numbers and takes the memory that the model's own compilation does. Elsewhere
        the backend is the one that flex_attention itself takes.
        """
        import torch._dynamo.utils

        def attend(*args: Any) -> tuple[Any, ...]:
            out, *rest = func(*args)
            options = args[6]
            wanted = [options.get(name, True) for name in ("OUTPUT_LOGSUMEXP", "OUTPUT_MAX")]
            return out, *(x if want else None for x, want in zip(rest, wanted, strict=False))

        backend = "inductor" if _is_compiled_by_model() else "eager"
        # flex_attention lifts the limit on recompilations too, which with fullgraph=True is an error
        with torch.compiler.set_stance("default"), torch._dynamo.utils.disable_cache_limit():
            out, *rest = torch.compile(attend, backend=backend, fullgraph=True)(*args[:7])
        return out, *(out.new_empty(0) if x is None else x for x in rest)

    def read(self, call: FunctionCall) -> AttentionCall:
        query, key, value, score_mod, block_mask, scale = call.args[:6]
        origins = call.origins
        q_layout, k_layout = origins.layout_of(query), origins.layout_of(key)
        q_origin, k_origin = origins.of(query), origins.of(key)
        mask_mod = block_mask[-1]
        query, key, value = query.detach(), key.detach(), value.detach()
        is_free = score_mod.__name__ == "_identity" and mask_mod.__name__ == "noop_mask"
        if is_free and query.shape[:2] == key.shape[:2]:  # nothing depends on the number of a sequence or head
            return read_fused(
                call, (query, q_origin, q_layout), (key, k_origin, k_layout), value, None, is_causal=False, scale=scale
            )
        relation = call.relation((q_origin, q_layout, q_layout.axes[2]), (k_origin, k_layout, k_layout.axes[2]))
        key = key.expand(query.shape[0], -1, -1, -1)
        K, device = key.shape[2], query.device

        def modify(scores: Tensor, start: int) -> Tensor:
            B, H, R, _ = scores.shape
            return _vectorised(score_mod, (B, H, start, start + R, K), device, scores)

        mask_shape = block_mask[2].shape[:2]  # it may be the same for all sequences or heads

        def allowed(start: int, stop: int) -> Tensor:
            return _vectorised(mask_mod, (*mask_shape, start, stop, K), device)

        return AttentionCall(
            "",
            query,
            key,
            scale=scale,
            score_mod=None if score_mod.__name__ == "_identity" else modify,
            mask_mod=None if mask_mod.__name__ == "noop_mask" else allowed,
            value=value,
            windows=n_windows(q_layout.axes[0], (*q_layout.axes[2], *k_layout.axes[2]), origins.first),
            **relation,
        )


def _vectorised(mod: Any, extent: tuple[int, ...], device: torch.device, *scores: Tensor) -> Tensor:
    """Call ``mod([score], b, h, query, key)``, which is written for one entry, on all entries (B, H, R, K).

    Args:
        mod: ``score_mod`` or ``mask_mod`` of the call.
        extent: B, H, first row, row after the last, K.
        device: device of the positions.
        scores: (B, H, R, K) for a ``score_mod``; left out for a ``mask_mod``.
    """
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    B, H, start, stop, K = extent
    positions = [torch.arange(*span, device=device) for span in ((0, B), (0, H), (start, stop), (0, K))]
    for axis in (3, 2, 1, 0):
        mod = torch.vmap(mod, in_dims=((0,) * len(scores)) + tuple(0 if axis == i else None for i in range(4)))
    with TransformGetItemToIndex():  # flex_attention lets a tensor be indexed by these positions
        return mod(*scores, *positions).detach()


def _is_compiled_by_model() -> bool:
    """Whether the model calls flex_attention from compiled code, which runs eagerly now but is still on the stack."""
    compiled = 0
    frame = inspect.currentframe()
    while frame is not None:
        compiled += frame.f_code.co_name == "compile_wrapper"
        frame = frame.f_back
    return compiled > 1  # flex_attention puts one such frame there itself
