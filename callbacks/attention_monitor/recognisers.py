"""Arguments of the functions that models call -> AttentionCall. A new kind of attention call is one class here.

Shapes: B sequences, H query heads, H_kv key heads, Q queries, K keys, D head dimensions, R rows of a block.
"""

import inspect
import math
import re
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .calls import AttentionCall
from .errors import AttentionMonitorError
from .origins import PRODUCTS, Frame, Origin, Origins, same_sequence, tensors_in

ATTENTION_NAME = re.compile("attention|attn", re.IGNORECASE)  # classes of modules that look like attention


class NotUnderstoodError(AttentionMonitorError):
    """An attention call in a form that no recogniser reads; the message is the reason."""


@dataclass(frozen=True)
class Seen:
    """A call of a function that a recogniser asked for, after it has run.

    Attributes:
        func: the function.
        args: it was called with.
        kwargs: it was called with.
        result: what it returned.
        frames: modules whose forward is running, outermost first.
        origins: where tensors come from.
        fates: of the softmaxes of this forward.
    """

    func: Any
    args: Sequence[Any]
    kwargs: dict[str, Any]
    result: Any
    frames: Sequence[Frame]
    origins: Origins
    fates: "list[Fate]"

    def same_sequence(self, query: Tensor, key: Tensor) -> bool | None:
        """Whether these queries and keys come from the same sequence; None where that was not seen."""
        return same_sequence(self.origins.of(query), self.origins.of(key), self.frames)


class Recogniser(ABC):
    """Reads the calls of ``functions``. Subclasses register themselves.

    Attributes:
        functions: torch functions; operators by name: ``library::operator``, ``flex_attention``.
    """

    functions: ClassVar[Sequence[Any]]

    def __init_subclass__(cls) -> None:
        for function in cls.functions:
            RECOGNISERS[function] = cls()

    @abstractmethod
    def read(self, seen: Seen) -> AttentionCall | None:
        """The attention call that this call is or completes, without its site; None: it is not attention.

        Raises:
            NotUnderstoodError: when it is attention in a form that cannot be read.
        """


RECOGNISERS: dict[Any, Recogniser] = {}


_OPERATORS = (torch._ops.OpOverload, torch._ops.OpOverloadPacket, torch._ops.HigherOrderOperator)


def name_of(func: Any) -> Any:
    """A function as ``functions`` names it: itself, or the name of an operator."""
    if not isinstance(func, _OPERATORS):
        return func
    if isinstance(func, torch._ops.HigherOrderOperator):
        return func.name()
    return (func.overloadpacket if isinstance(func, torch._ops.OpOverload) else func)._qualified_op_name


class ScaledDotProduct(Recogniser):
    """``torch.nn.functional.scaled_dot_product_attention``."""

    functions = (F.scaled_dot_product_attention,)

    def read(self, seen: Seen) -> AttentionCall:
        return self._read(seen, *seen.args, **seen.kwargs)

    def _read(
        self,
        seen: Seen,
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
        self_attention = seen.same_sequence(query, key)
        query, key = _as_computed(query.detach()), _as_computed(key.detach())
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
            _four_dimensional(query),
            _four_dimensional(key),
            None if mask is None else _four_dimensional(mask),
            is_causal,
            scale,
            self_attention=self_attention,
            value=_four_dimensional(_as_computed(value.detach())),
        )


def _as_computed(x: Tensor) -> Tensor:
    """As autocast rounds it inside the call."""
    device = x.device.type
    return (
        x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) and x.dtype == torch.float32 else x
    )


def _four_dimensional(x: Tensor) -> Tensor:
    """(Q, D) and (B, Q, D) get a head of their own; of more than four axes, all between batch and Q are heads."""
    if x.dim() == 4:
        return x
    if x.dim() < 4:
        return x.reshape((1,) * (3 - x.dim()) + x.shape).unsqueeze(1)
    return x.flatten(1, -3)


class MultiHeadAttention(Recogniser):
    """``F.multi_head_attention_forward``, which is what ``nn.MultiheadAttention`` calls.

    What it calls in turn is hidden, so queries and keys are projected once more.
    """

    functions = (F.multi_head_attention_forward,)

    def read(self, seen: Seen) -> AttentionCall:
        return self._read(seen, *seen.args, **seen.kwargs)

    def _read(
        self,
        seen: Seen,
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
        origins, H = seen.origins, num_heads
        self_attention: bool | None = query is key
        if not self_attention:
            self_attention = same_sequence(origins.of(query), origins.of(key), seen.frames, projects=True)
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
        return AttentionCall(
            "",
            q.detach(),
            k.detach(),
            _merged(masks, n_sinks),
            scale=1 / math.sqrt(E // H),
            n_sinks=n_sinks,
            sinks_in_pattern=True,
            self_attention=self_attention,
            value=v.detach(),
        )


def _merged(masks: list[Tensor], n_sinks: int) -> Tensor | None:
    """One mask as scaled_dot_product_attention takes it from several as nn.MultiheadAttention does (True: hidden)."""
    if not masks:
        return None
    padded = [F.pad(mask, (0, n_sinks)) for mask in masks]  # False, 0: everybody sees what was appended
    if all(mask.dtype == torch.bool for mask in padded):
        return ~torch.stack(torch.broadcast_tensors(*padded)).any(0)
    floating = [
        torch.zeros_like(mask, dtype=torch.float32).masked_fill_(mask, -torch.inf)
        if mask.dtype == torch.bool
        else mask.float()
        for mask in padded
    ]
    return torch.stack(torch.broadcast_tensors(*floating)).sum(0)


class FlexAttention(Recogniser):
    """``torch.nn.attention.flex_attention``, by the operator in which it ends."""

    functions = ("flex_attention",)

    def read(self, seen: Seen) -> AttentionCall:
        query, key, value, score_mod, block_mask, scale = seen.args[:6]
        self_attention = seen.same_sequence(query, key)
        query, key = query.detach(), key.detach()
        key = key.expand(query.shape[0], -1, -1, -1)
        K, device = key.shape[2], query.device

        def modify(scores: Tensor, start: int) -> Tensor:
            B, H, R, _ = scores.shape
            return _vectorised(score_mod, (B, H, start, start + R, K), device, scores)

        mask_mod, mask_shape = block_mask[-1], block_mask[2].shape[:2]  # it may be the same for all sequences or heads

        def allowed(start: int, stop: int) -> Tensor:
            return _vectorised(mask_mod, (*mask_shape, start, stop, K), device)

        return AttentionCall(
            "",
            query,
            key,
            scale=scale,
            score_mod=None if score_mod.__name__ == "_identity" else modify,
            mask_mod=None if mask_mod.__name__ == "noop_mask" else allowed,
            self_attention=self_attention,
            value=value.detach(),
        )


def _vectorised(mod: Any, extent: tuple[int, ...], device: torch.device, *scores: Tensor) -> Tensor:
    """``mod([score], b, h, query, key)``, written for one entry, over (B, H, R, K)."""
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    B, H, start, stop, K = extent
    positions = [torch.arange(*span, device=device) for span in ((0, B), (0, H), (start, stop), (0, K))]
    for axis in (3, 2, 1, 0):
        mod = torch.vmap(mod, in_dims=((0,) * len(scores)) + tuple(0 if axis == i else None for i in range(4)))
    with TransformGetItemToIndex():  # flex_attention lets a tensor be indexed by these positions
        return mod(*scores, *positions).detach()


def run_flex_attention(func: Any, args: Sequence[Any]) -> Any:
    """Run the flex_attention operator as it would run if nobody were watching.

    Watching makes compiled code run eagerly, and there the operator is not itself: its gradients for tensors that
    ``score_mod`` uses are lost, and it holds all scores. So it is compiled here: with the default backend where the
    model had compiled it, for numbers and memory as they are there; with the backend that flex_attention itself takes
    otherwise.
    """
    import torch._dynamo.utils

    compiled = 0
    frame = inspect.currentframe()
    while frame is not None:
        compiled += frame.f_code.co_name == "compile_wrapper"
        frame = frame.f_back
    # flex_attention puts one such frame there itself
    backend = "inductor" if compiled > 1 else "eager"

    def attend(*args: Any) -> tuple[Any, ...]:
        out, *rest = func(*args)
        options = args[6]
        wanted = [options.get(name, True) for name in ("OUTPUT_LOGSUMEXP", "OUTPUT_MAX")]
        return out, *(x if want else None for x, want in zip(rest, wanted, strict=False))

    # flex_attention lifts the limit on recompilations too, which with fullgraph=True is an error
    with torch.compiler.set_stance("default"), torch._dynamo.utils.disable_cache_limit():
        out, *rest = torch.compile(attend, backend=backend, fullgraph=True)(*args[:7])
    return out, *(out.new_empty(0) if x is None else x for x in rest)


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

    def read(self, seen: Seen) -> AttentionCall:
        overload = seen.func if isinstance(seen.func, torch._ops.OpOverload) else seen.func.default
        names = [argument.name for argument in overload._schema.arguments]
        given = dict(zip(names, seen.args, strict=False)) | seen.kwargs
        given = {self._NAMES.get(name, name): value for name, value in given.items() if value is not None}
        unreadable = [name for name in self._UNREADABLE if name in given]
        if unreadable:
            raise NotUnderstoodError(f"{overload.name()} was given {', '.join(unreadable)}, which is not supported")
        query, key = given["query"], given["key"]
        self_attention = seen.same_sequence(query, key)
        query, key, value = query.detach(), key.detach(), given["value"].detach()
        if query.dim() == 3:  # all sequences one after the other: (tokens, H, D)
            query, key, value = query[None], key[None], value[None]
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # (B, H, Q, D)
        Q, K, device = query.shape[2], key.shape[2], query.device
        q_segment, q_local, q_lengths = _segments(given.get("cu_seqlens_q"), Q, device)
        k_segment, k_local, k_lengths = _segments(given.get("cu_seqlens_k"), K, device)
        # the last query is aligned with the last key; the numbers of custom_mask_type: 1 aligns the first ones
        from_top = given.get("custom_mask_type", 0) == 1
        if not from_top and len(q_lengths) == len(k_lengths):
            q_local = q_local + (k_lengths - q_lengths)[q_segment]
        causal = bool(given.get("is_causal", False)) or given.get("custom_mask_type", 0) > 0
        left = given.get("window_left", -1)
        right = 0 if causal else given.get("window_right", -1)
        window = given.get("window_size", 0)  # of the efficient kernel: the keys from i - window + 1
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
            self_attention=self_attention,
            value=value,
        )


def _segments(cu_seqlens: Tensor | None, n: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Segment of each token, its position there, and the lengths of the segments."""
    ends = torch.tensor([0, n], device=device) if cu_seqlens is None else cu_seqlens.long()
    lengths = ends.diff()
    segment = torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths)
    return segment, torch.arange(len(segment), device=device) - ends[segment], lengths


@dataclass(eq=False)
class Fate:
    """What becomes of a softmax; outlives its tensors.

    Attributes:
        path: of the attention module it was in; None: in none.
        met_values: its result has been multiplied with values.
    """

    path: str | None
    met_values: bool = False


@dataclass(frozen=True, eq=False)
class Candidate:
    """A softmax whose result may turn out to be attention.

    Attributes:
        scores: what went in.
        result: what came out.
        versions: of both, to see whether they have been written to.
        axis: over which the softmax was taken.
        product: origins of queries and keys; None where they were not seen.
        fate: what becomes of it.
    """

    scores: Tensor
    result: weakref.ref[Tensor]
    versions: tuple[int, int]
    axis: int
    product: tuple[Origin, Origin] | None
    fate: Fate


@dataclass(frozen=True, eq=False)
class Probabilities:
    """What a tensor carries that is the result of a softmax, up to dropout, masks, casts, views, left-out columns.

    Attributes:
        candidate: the softmax.
        shape: of the tensor.
        start: first column of the softmax that is still there.
        weights: what the model made of the result, before dropout; None: nothing.
    """

    candidate: Candidate
    shape: Sequence[int]
    start: int = 0
    weights: Tensor | None = None

    def handed_on(self, tensor: Tensor, changed: bool) -> "Probabilities | None":
        """For a tensor that was computed from this one."""
        if self.candidate.fate.met_values or tensor.dim() < 2 or not tensor.is_floating_point():
            return None
        width, n = self.shape[-1], tensor.numel()
        weights = tensor.detach() if changed else self.weights
        if n == math.prod(self.shape):
            return replace(self, shape=tensor.shape, weights=weights)
        if tensor.shape[-1] < width and n * width == math.prod(self.shape) * tensor.shape[-1]:  # without sinks
            offset = int(tensor.storage_offset())
            start = self.start + (offset if offset <= width - tensor.shape[-1] else 0)
            return replace(self, shape=tensor.shape, start=start, weights=weights)
        return None


class ExplicitSoftmax(Recogniser):
    """Attention written out: a softmax of products of queries and keys, whose result is multiplied with values.

    A softmax that is not both - of a classifier, a router, a loss - is not taken for attention. Where the product
    was not seen (scores from a layer, or from another library), the module must be called an attention.
    """

    functions = (F.softmax, torch.softmax, Tensor.softmax, torch.special.softmax, *PRODUCTS)

    def read(self, seen: Seen) -> AttentionCall | None:
        if seen.func in PRODUCTS:
            return self._read_product(seen)
        self._read_softmax(seen, *seen.args, **seen.kwargs)
        return None

    def _read_softmax(self, seen: Seen, input: Tensor, dim: Any = None, *_: Any, axis: Any = None, **__: Any) -> None:
        dim = axis if dim is None else dim
        if not isinstance(dim, int) or input.dim() < 2 or input.numel() == 0:
            return
        origin, dim = seen.origins.of(input), dim % input.dim()
        named = [frame for frame in seen.frames[-2:] if ATTENTION_NAME.search(type(frame.module).__name__)]
        if origin.product is None and (not named or _is_over_features(origin)):
            return
        fate = Fate(named[-1].name if named else None)
        seen.fates.append(fate)
        result = seen.result
        # softmax(scores, out=scores) leaves them up to a constant
        scores = result.detach().log() if result.data_ptr() == input.data_ptr() else input.detach()
        versions = _version(scores), _version(result)
        candidate = Candidate(scores, weakref.ref(result), versions, dim, origin.product, fate)
        seen.origins.attach(result, Probabilities(candidate, result.shape))

    def _read_product(self, seen: Seen) -> AttentionCall | None:
        tensors = list(tensors_in((*seen.args, *seen.kwargs.values())))[-2:]
        carried = [seen.origins.carried(tensor) for tensor in tensors]
        if len(tensors) < 2 or (carried[0] is None) == (carried[1] is None):
            return None
        side = 0 if carried[1] is None else 1
        weights, values, probabilities = tensors[side], tensors[1 - side], carried[side]
        candidate, product = probabilities.candidate, probabilities.candidate.product
        if candidate.fate.met_values or not seen.origins.of(values).is_data:
            return None
        if seen.func is torch.einsum and weights.dim() == candidate.scores.dim():
            axes = _axes_of_einsum(seen, weights, side)
        else:
            axes = _axes_of_matmul(candidate, weights, side)
        if axes is None or axes[2] != candidate.axis:
            return None
        candidate.fate.met_values = True
        batch, rows, columns = axes
        scores, width = _scores(candidate), candidate.scores.shape[columns]
        kept = probabilities.shape[columns - scores.dim()] if side == 0 and columns == scores.dim() - 1 else width
        if probabilities.weights is not None:
            changed = _changed_weights(scores, probabilities, columns, kept)
            scores, width = (scores, width) if changed is None else (changed, kept)
        shape = [scores.shape[axis] for axis in batch]
        Q = math.prod(scores.shape[axis] for axis in rows)
        scores = scores.permute(*batch, *rows, columns).reshape(*shape, Q, width)
        if scores.dim() == 3:
            scores = _with_heads(seen, candidate, scores)
        if kept < width:  # the columns that the values never meet go last
            start, stop = probabilities.start, probabilities.start + kept
            scores = torch.cat([scores[..., start:stop], scores[..., :start], scores[..., stop:]], -1)
        return AttentionCall(
            "",
            None,
            None,
            model_scores=_four_dimensional(scores),
            n_sinks=width - kept,
            self_attention=same_sequence(product[0], product[1], seen.frames) if product else None,
        )


def _is_over_features(origin: Origin) -> bool:
    """Whether a softmax is over what a layer puts out, as in a router, and not over positions."""
    for _ in range(20):
        if origin.is_projection:
            return origin.shape[-1] != 1  # one number for each position: additive attention
        parents = [parent for parent in origin.parents if parent.is_data]
        if not parents:
            return False
        origin = parents[0]
    return False


Axes = tuple[Sequence[int], Sequence[int], int]  # of scores: batch and heads, queries, keys


def _axes_of_matmul(candidate: Candidate, weights: Tensor, side: int) -> Axes | None:
    """``weights @ values``, or ``values @ weights`` with keys before queries."""
    n, shape, axis = candidate.scores.dim(), candidate.scores.shape, candidate.axis
    rows = weights.shape[-2 if side == 0 else -1]
    if n == 2 and rows == 1 and axis == 1:  # (B, K): one query, such as the state of an RNN
        return (0,), (), 1
    if axis == n - 1 and rows == shape[-2]:
        return range(n - 2), (n - 2,), n - 1
    if axis == n - 2 and rows == shape[-1]:  # the scores are keys x queries
        return range(n - 2), (n - 1,), n - 2
    return None  # its rows have become a batch: each mixes its own experts


def _axes_of_einsum(seen: Seen, weights: Tensor, side: int) -> Axes | None:
    """By its equation: keys are summed over; queries are not in the values, nor are heads that share them."""
    equation = seen.args[0] if seen.args and isinstance(seen.args[0], str) else ""
    inputs, _, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if len(terms) != 2 or not output:
        return None
    ours, theirs = terms[side], terms[1 - side]
    if "..." in ours:
        letters = "".join(chr(ord("0") + i) for i in range(weights.dim() - len(ours) + 3))
        ours, theirs, output = (term.replace("...", letters) for term in (ours, theirs, output))
    batch = [i for i, c in enumerate(ours) if c in theirs and c in output]
    rows = [i for i, c in enumerate(ours) if c not in theirs and c in output]
    keys = [i for i, c in enumerate(ours) if c in theirs and c not in output]
    if len(keys) != 1 or len(batch) + len(rows) + 1 != len(ours) or (not rows and len(ours) > 2):
        return None
    return [*batch, *rows[:-1]], rows[-1:], keys[0]


def _scores(candidate: Candidate) -> Tensor:
    if _version(candidate.scores) == candidate.versions[0]:
        return candidate.scores
    result = candidate.result()
    if result is None or _version(result) != candidate.versions[1]:
        raise NotUnderstoodError("its scores were overwritten before they met the values")
    return result.detach().log()  # the scores up to a constant


def _changed_weights(scores: Tensor, probabilities: Probabilities, columns: int, kept: int) -> Tensor | None:
    """Scores that give the weights which the model used, where they are not the softmax of its scores.

    None: they are, but for rows that may see nothing, which are set to 0.

    Raises:
        NotUnderstoodError: when the weights do not sum to 1.
    """
    weights = probabilities.weights
    assert weights is not None
    start = probabilities.start
    softmax = scores.float().softmax(columns).narrow(columns, start, kept)
    tolerance = 1e-5 if weights.dtype in (torch.float32, torch.float64) else 1e-2
    weights = weights.float()
    if weights.numel() != softmax.numel() or weights.dim() != softmax.dim():
        weights = weights.reshape(softmax.shape) if weights.numel() == softmax.numel() else softmax
    total = weights.sum(columns, keepdim=True)
    nothing = ~(total.abs() > tolerance)  # also NaN
    if bool((((weights - softmax).abs() <= tolerance) | nothing | (weights == 0) & (softmax <= tolerance)).all()):
        return None
    if bool((((total - 1).abs() <= 100 * tolerance) | nothing).all()) and bool((weights >= 0).all()):
        return weights.log()
    raise NotUnderstoodError("after the softmax its weights were changed to others that do not sum to 1")


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


_HEADS = (
    "num_heads",
    "n_heads",
    "n_head",
    "num_attention_heads",
    "nhead",
    "heads",
    "n_local_heads",
    "nheads",
    "nh",
    "h",
)


def _with_heads(seen: Seen, candidate: Candidate, scores: Tensor) -> Tensor:
    """(B, H, Q, K) of (n, Q, K), in which sequences and heads are one axis, or which has one head.

    How many there are, and which comes first, is seen on the way from the projection of the queries: in a tensor of
    more axes, in heads that are put one after the other, in the width of the projection; or the module names it.
    """
    n = scores.shape[0]
    if candidate.product is None:
        return scores.unsqueeze(1)
    query, key = candidate.product
    way = list(_to_projection(query if query.is_data else key))
    source = next((parent.shape for parent in way[-1].parents if parent.is_data), way[-1].shape)
    batch_sizes = set(source[:2]) if len(source) > 2 else {1}
    width = way[0].shape[-1]
    for origin in way:
        pieces = [parent for parent in origin.parents if parent.is_data]
        if len(pieces) > 1 and n % len(pieces) == 0 and all(p.shape[0] * len(pieces) == n for p in pieces):
            return scores.unflatten(0, (len(pieces), -1)).transpose(0, 1)
        if len(origin.shape) == 4 and origin.shape[0] * origin.shape[1] == n:
            first, second = origin.shape[:2]
            if first not in batch_sizes and second in batch_sizes:
                return scores.unflatten(0, (first, second)).transpose(0, 1)
            return scores.unflatten(0, (first, second))
    named = [getattr(frame.module, name, None) for frame in reversed(seen.frames[-2:]) for name in _HEADS]
    one = [1] if n == (source[0] if len(source) > 2 else 1) else []
    widths = [origin.shape[-1] for origin in way if origin.shape and origin.shape[-1] > width]
    parts = [w // width // share for w in widths for share in (1, 3, 2) if w % (width * share) == 0]
    for H in (*named, *one, *parts):
        if isinstance(H, int) and H > 0 and n % H == 0 and n // H in batch_sizes:
            return scores.unflatten(0, (n // H, H))
    return scores.unsqueeze(1)


def _to_projection(origin: Origin) -> Iterator[Origin]:
    """From a tensor back to the projection that it comes from, along what has most entries."""
    for _ in range(50):
        yield origin
        parents = [parent for parent in origin.parents if parent.is_data]
        if origin.is_projection or not parents:
            return
        origin = max(parents, key=lambda parent: math.prod(parent.shape))
