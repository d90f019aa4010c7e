"""Attention written out: a softmax of scores, whose result is multiplied with values.

Shapes: B sequences, H query heads, H_kv key heads, Q queries, K keys, D head dimensions, R rows of a block.
"""

import math
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention_call import AttentionCall
from ..provenance import PRODUCTS, Origin, same_sequence, tensors_in
from .base import ATTENTION_NAME, Fate, NotUnderstoodError, Recogniser, Seen, four_dimensional


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
            model_scores=four_dimensional(scores),
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
