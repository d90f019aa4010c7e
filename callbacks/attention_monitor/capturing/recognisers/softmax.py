"""Attention written out: a softmax of scores, whose result is multiplied with values.

Shapes: B sequences, H query heads, H_kv key heads, Q queries, K keys, D head dimensions, R rows of a block.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention_call import AttentionCall
from ..merged_heads import with_heads
from ..provenance import Origin, same_sequence, tensors_in
from ..running_modules import ATTENTION_NAME
from ..torch_functions import PRODUCTS
from ..tracked_weights import SoftmaxInput, SoftmaxOutcome, TrackedWeights
from .base import FunctionCall, Recogniser, four_dimensional


class ExplicitSoftmax(Recogniser):
    """Attention written out: a softmax of products of queries and keys, whose result is multiplied with values.

    A softmax that is not both - of a classifier, a router, a loss - is not taken for attention. Where the product
    was not seen (scores from a layer, or from another library), the module must be called an attention.
    """

    functions = (F.softmax, torch.softmax, Tensor.softmax, torch.special.softmax, *PRODUCTS)
    reads = "a softmax of products of queries and keys that is multiplied with values"

    def __init__(self) -> None:
        self._outcomes: list[SoftmaxOutcome] = []  # of the softmaxes of this forward

    def read(self, call: FunctionCall) -> AttentionCall | None:
        if call.func in PRODUCTS:
            return self._read_product(call)
        self._read_softmax(call, *call.args, **call.kwargs)
        return None

    def at_end_of_forward(self, understood: Collection[str]) -> Iterator[tuple[str, str]]:
        """Yield the attention modules in which a softmax led to no call."""
        met_values = {outcome.path for outcome in self._outcomes if outcome.met_values}
        for outcome in self._outcomes:
            if outcome.path is not None and outcome.path not in met_values and outcome.path not in understood:
                yield outcome.path, "its softmax was not seen to be multiplied with values by a matmul or einsum"
        self._outcomes.clear()

    def _read_softmax(
        self, call: FunctionCall, input: Tensor, dim: Any = None, *_: Any, axis: Any = None, **__: Any
    ) -> None:
        dim = axis if dim is None else dim
        if not isinstance(dim, int) or input.dim() < 2 or input.numel() == 0:
            return
        origin = call.origins.of(input)
        named = [frame for frame in call.frames[-2:] if ATTENTION_NAME.search(type(frame.module).__name__)]
        if origin.product is None and (not named or _is_over_features(origin)):
            return
        outcome = SoftmaxOutcome(named[-1].name if named else None)
        self._outcomes.append(outcome)
        softmax = SoftmaxInput.of(input, call.result, dim % input.dim(), origin.product, outcome)
        call.origins.attach(call.result, TrackedWeights(softmax, call.result.shape))

    def _read_product(self, call: FunctionCall) -> AttentionCall | None:
        tensors = list(tensors_in((*call.args, *call.kwargs.values())))[-2:]
        attached = [call.origins.attachment(tensor) for tensor in tensors]
        if len(tensors) < 2 or (attached[0] is None) == (attached[1] is None):
            return None
        side = 0 if attached[1] is None else 1
        weights, values, tracked = tensors[side], tensors[1 - side], attached[side]
        softmax = tracked.softmax
        if softmax.outcome.met_values or not call.origins.of(values).is_data:
            return None
        axes = _axes_of_product(call, softmax, weights, side)
        if axes is None or axes[2] != softmax.axis:
            return None
        softmax.outcome.met_values, product = True, softmax.product
        scores, n_sinks = _scores_of_product(tracked, axes, side)
        if scores.dim() == 3:
            scores = with_heads(scores, product, [frame.module for frame in reversed(call.frames[-2:])])
        return AttentionCall(
            "",
            None,
            None,
            model_scores=four_dimensional(scores),
            n_sinks=n_sinks,
            self_attention=same_sequence(product[0], product[1], call.frames) if product else None,
        )


# A router's softmax follows its layer by a few views, casts and masks; in a module that has no layer of its own the way
# back would lead through the whole model.
_MOST_STEPS = 20


def _is_over_features(origin: Origin) -> bool:
    """Whether a softmax is over what a layer puts out, as in a router, and not over positions."""
    for _ in range(_MOST_STEPS):
        if origin.is_projection:
            return origin.shape[-1] != 1  # one number for each position: additive attention
        parents = [parent for parent in origin.parents if parent.is_data]
        if not parents:
            return False
        origin = parents[0]
    return False


Axes = tuple[Sequence[int], Sequence[int], int]  # of scores: batch and heads, queries, keys


def _axes_of_product(call: FunctionCall, softmax: SoftmaxInput, weights: Tensor, side: int) -> Axes | None:
    """Tell the axes of scores apart by the product in which their weights meet the values.

    Args:
        call: the product.
        softmax: softmax that the weights are the result of.
        weights: weights as they are multiplied.
        side: 0 for ``weights @ values``, 1 for ``values @ weights``.

    Returns:
        axes: None when the weights are not those of keys for queries.
    """
    if call.func is torch.einsum and weights.dim() == softmax.scores.dim():
        return _axes_of_einsum(call, weights, side)
    return _axes_of_matmul(softmax, weights, side)


def _axes_of_matmul(softmax: SoftmaxInput, weights: Tensor, side: int) -> Axes | None:
    """Tell axes apart in ``weights @ values``, or in ``values @ weights`` with keys before queries."""
    n, shape, axis = softmax.scores.dim(), softmax.scores.shape, softmax.axis
    rows = weights.shape[-2 if side == 0 else -1]
    if n == 2 and rows == 1 and axis == 1:  # (B, K): one query, such as the state of an RNN
        return (0,), (), 1
    if axis == n - 1 and rows == shape[-2]:
        return range(n - 2), (n - 2,), n - 1
    if axis == n - 2 and rows == shape[-1]:  # the scores are keys x queries
        return range(n - 2), (n - 1,), n - 2
    return None  # its rows have become a batch: each mixes its own experts


def _axes_of_einsum(call: FunctionCall, weights: Tensor, side: int) -> Axes | None:
    """Tell axes apart by the letters of an equation.

    Keys are summed over. Queries are not in the values, nor are heads that share values.
    """
    terms = _terms_of_einsum(call, weights.dim(), side)
    if terms is None:
        return None
    ours, theirs, output = terms
    batch = [i for i, letter in enumerate(ours) if letter in theirs and letter in output]
    rows = [i for i, letter in enumerate(ours) if letter not in theirs and letter in output]
    keys = [i for i, letter in enumerate(ours) if letter in theirs and letter not in output]
    if len(keys) != 1 or len(batch) + len(rows) + 1 != len(ours):
        return None
    if not rows and len(ours) > 2:
        return None
    return [*batch, *rows[:-1]], rows[-1:], keys[0]


def _terms_of_einsum(call: FunctionCall, n_axes: int, side: int) -> tuple[str, str, str] | None:
    """Return the letters of the weights, of the values and of the output, with digits for an ellipsis."""
    equation = call.args[0] if call.args and isinstance(call.args[0], str) else ""
    inputs, _, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if len(terms) != 2 or not output:
        return None
    ours, theirs = terms[side], terms[1 - side]
    if "..." in ours:
        letters = "".join(chr(ord("0") + i) for i in range(n_axes - len(ours) + len("...")))
        ours, theirs, output = (term.replace("...", letters) for term in (ours, theirs, output))
    return ours, theirs, output


def _scores_of_product(tracked: TrackedWeights, axes: Axes, side: int) -> tuple[Tensor, int]:
    """Return the scores (..., Q, K + n_sinks), columns that the values never meet last, and the number of those."""
    batch, rows, columns = axes
    scores = tracked.softmax.readable_scores()
    width = scores.shape[columns]
    keeps_columns_last = side == 0 and columns == scores.dim() - 1
    kept = tracked.shape[columns - scores.dim()] if keeps_columns_last else width
    changed = tracked.changed_scores(scores, columns, kept)
    if changed is not None:
        scores, width = changed, kept
    shape = [scores.shape[axis] for axis in batch]
    Q = math.prod(scores.shape[axis] for axis in rows)
    scores = scores.permute(*batch, *rows, columns).reshape(*shape, Q, width)
    if kept < width:
        start, stop = tracked.start, tracked.start + kept
        scores = torch.cat([scores[..., start:stop], scores[..., :start], scores[..., stop:]], -1)
    return scores, width - kept
