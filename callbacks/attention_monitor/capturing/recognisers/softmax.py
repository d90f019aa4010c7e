"""Attention written out: a softmax of products of queries and keys.

Shapes: B sequences, H query heads, Q queries, K keys.
"""

import math
from collections.abc import Collection, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention_call import AttentionCall, NotUnderstoodError
from ..axes import Axis, Layout, Part, Source, SourceKind, Tag, is_features, tag_of, untagged
from ..axis_rules import letters_of_product
from ..loops import Clue
from ..products import Product
from ..provenance import tensors_in
from ..roles import MetValues, Roles, of_scores
from ..running_modules import looks_like_attention
from ..torch_functions import PRODUCTS
from ..tracked_weights import SoftmaxInput, SoftmaxOutcome, TrackedWeights
from .base import FunctionCall, Recogniser

_NOT_MULTIPLIED = "its softmax was not seen to be multiplied with values by a matmul or einsum"
_OF_FEATURES = "its softmax is over features, as in linear attention and routers, and no attention over tokens"


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
        """Yield each softmax of an attention module that led to no call."""
        for outcome in self._outcomes:
            if outcome.path is not None and not outcome.met_values:
                yield outcome.path, outcome.reason or _NOT_MULTIPLIED
        self._outcomes.clear()

    def _read_softmax(
        self, call: FunctionCall, input: Tensor, dim: Any = None, *_: Any, axis: Any = None, **__: Any
    ) -> None:
        dim = axis if dim is None else dim
        if not isinstance(dim, int) or input.dim() < 2 or input.numel() == 0:
            return
        layout = call.origins.layout_of(input)
        tag = tag_of(layout.axes[dim])
        if tag is not None and (tag.product.is_over(tag.side) is None or not _has_rows(layout, tag)):
            tag = None
        named = [frame for frame in call.frames[-2:] if looks_like_attention(frame.module)]
        if tag is None and not named:
            return
        outcome = SoftmaxOutcome(named[-1].name if named else None)
        self._outcomes.append(outcome)
        softmax = SoftmaxInput.of(input, layout, call.result, dim % input.dim(), tag, outcome)
        call.origins.of(call.result).layout = softmax.result_layout
        call.origins.attach(call.result, TrackedWeights(softmax))

    def _read_product(self, call: FunctionCall) -> AttentionCall | None:
        given = [x for x in tensors_in((*call.args, *call.kwargs.values())) if call.origins.is_data(x)]
        attached = [(x, found) for x in given if (found := call.origins.attachment(x)) is not None]
        if len(attached) != 1 or attached[0][1].softmax.outcome.met_values:
            return None
        [(weights, tracked)] = attached
        softmax, layout = tracked.softmax, call.origins.layout_of(weights)
        met = _met_values(call, weights, layout, softmax)
        if met is None:
            return None
        key_axis = softmax.layout.axes[softmax.axis]
        if softmax.tag is None and is_features(key_axis) and is_features(met.keys):
            softmax.outcome.reason = _OF_FEATURES
            return None
        reader = _Reader(call, tracked, met)
        softmax.outcome.met_values = True
        of_result = call.origins.of(call.result)
        of_result.layout = call.origins.layout_of(call.result).untagged()  # what comes out are tokens, not scores
        return reader.read(layout)


def _has_rows(layout: Layout, tag: Tag) -> bool:
    """Whether the axes of the other factor are still there: what has been projected since is no product any more."""
    rows = Tag(tag.product, 1 - tag.side)
    if not tag.product.factors[rows.side].axes(tag.product.free(rows.side)):
        return True  # a single query
    return any(tag_of((part,)) == rows for part in layout.parts)


def _met_values(call: FunctionCall, weights: Tensor, layout: Layout, softmax: SoftmaxInput) -> MetValues | None:
    """Tell how weights meet the values in a product that sums over their columns; None where it is no such product."""
    found = letters_of_product(call.func, call.args, call.kwargs, list(tensors_in((*call.args, *call.kwargs.values()))))
    if found is None:
        return None
    tensors, terms, output = found
    if not any(tensor is weights for tensor in tensors):
        return None
    ours = next(term for tensor, term in zip(tensors, terms, strict=True) if tensor is weights)
    others = [
        (tensor, term)
        for tensor, term in zip(tensors, terms, strict=True)
        if tensor is not weights and call.origins.is_data(tensor)
    ]
    if len(others) != 1:
        return None
    [(values, theirs)] = others
    columns = [at for at, axis in enumerate(layout.axes) if any(part.source is softmax.columns for part in axis)]
    if len(columns) != 1 or len(layout.axes[columns[0]]) != 1:
        return None
    letter = ours[columns[0]]
    if letter in output or letter not in theirs:
        return None
    of_values = call.origins.layout_of(values)
    shared = {letter for letter in ours if letter in theirs and of_values.axes[theirs.index(letter)]}
    others_of_weights = [at for at in range(len(layout.axes)) if at != columns[0]]
    free, both = (
        frozenset(
            (p.source, p.stride) for at in others_of_weights if (ours[at] in shared) == wanted for p in layout.axes[at]
        )
        for wanted in (False, True)
    )
    return MetValues(free, both, untagged(of_values.axes[theirs.index(letter)]), of_values, call.origins.of(values))


class _Reader:
    """Reads the weights of a softmax that have met the values as an attention call.

    Args:
        call: the product in which they have.
        tracked: the weights.
        met: how they have.
    """

    def __init__(self, call: FunctionCall, tracked: TrackedWeights, met: MetValues) -> None:
        self.call, self.tracked, self.softmax, self.met = call, tracked, tracked.softmax, met
        tag = self.softmax.tag
        self.product: Product | None = None if tag is None else tag.product
        self.key_side = 1 if tag is None else tag.side
        self.over = "tokens" if tag is None else self.product.is_over(self.key_side)  # type: ignore[union-attr]

    def read(self, met_with: Layout) -> AttentionCall:
        """Return the call.

        Args:
            met_with: what the axes of the weights are made of where they met the values.

        Raises:
            NotUnderstoodError: when it cannot be told what they are.
        """
        softmax = self.softmax
        scores = softmax.readable_scores()
        roles = self._roles(softmax.layout, scores.shape, softmax.axis)
        kept = next(part for part in met_with.parts if part.source is softmax.columns)
        if self._has_keys_besides(kept):  # the values of several kinds of keys are met one after the other
            kept = kept._replace(size=softmax.columns.size, start=0)
        relation = self._relation(roles, scores.shape[softmax.axis] - kept.size)
        arranged = roles.arranged(scores)  # (B, H, Q, columns)
        n_sinks = arranged.shape[-1] - kept.size
        given: dict[str, Any] = {"model_scores": _columns_last(arranged, kept.start, kept.size), "n_sinks": n_sinks}
        if self.tracked.weights is not None:
            given = self._changed(given, kept.start, kept.size)
        return AttentionCall("", None, None, **given, windows=roles.n_windows, assumed=roles.assumed, **relation)

    def _has_keys_besides(self, kept: Part) -> bool:
        """Whether columns that were not met are scores of keys too, and no learned sinks."""
        axis = self.softmax.layout.axes[self.softmax.axis]
        segments = [segment for part in axis for segment in part.source.segments] if len(axis) == 1 else []
        return any(
            tag_of(inner) is not None and not kept.start <= start < kept.start + kept.size for start, inner in segments
        )

    def _roles(self, layout: Layout, shape: torch.Size, columns: int) -> Roles:
        said, first = self.call.said_heads, self.call.origins.first
        sources = {part.source for part in self.met.layout.parts}
        known = any(part.source in sources for part in layout.parts)  # or they come from what was not seen
        roles = of_scores(layout, shape, columns, self.product, self.key_side, self.met, first, said, known)
        if self.product is None and not is_features(self.softmax.layout.axes[self.softmax.axis]):
            free = [p for p in _parts(layout, columns) if p is not None and self.met.is_free(p)]
            if any(part.source.kind is SourceKind.FEATURES for part in free):
                raise NotUnderstoodError(_OF_FEATURES)
        return roles

    def _relation(self, roles: Roles, n_sinks: int) -> dict[str, Any]:
        """Tell whether queries and keys are the same tokens, and where the queries are."""
        softmax, met = self.softmax, self.met
        if self.over == "channels":
            return {"self_attention": True, "over": "channels", "positions_known": False}
        if self.product is None:
            parts = _parts(softmax.layout, softmax.axis)
            rows = tuple(part for i in roles.rows if (part := parts[i]) is not None)
            origin = self.call.origins.of(softmax.scores)
            if not rows or is_features(rows):  # pooling, a state; queries that a layer makes for each place
                depth = origin.mixed, met.origin.mixed
                self.call.clue = Clue(rows, frozenset(), frozenset(), frozenset(), met.keys, depth)
                return {"self_attention": None, "positions_known": False}
            return self.call.relation(
                (origin, Layout((rows,)), rows), (origin, met.layout, met.keys), own_keys=roles.own_keys
            )
        q, k = self.product.factors[1 - self.key_side], self.product.factors[self.key_side]
        rows = q.axes(self.product.free(1 - self.key_side))
        parts = _parts(softmax.layout, softmax.axis)
        own = {part.source for i in roles.rows if (part := parts[i]) is not None}
        rows = tuple(part for part in (q.layout.parts if roles.own_keys else rows) if part.source in own)
        keys = untagged(softmax.layout.axes[softmax.axis])
        if n_sinks or len(keys) != 1 or keys[0].source.segments:
            letters = self.product.free(self.key_side)
            tagged = [letter for letter in letters if _sources(k.axis(letter)) & _sources(keys)]
            keys = k.axes(tagged)
        is_whole = math.prod(roles.sizes[i] for i in roles.rows) == math.prod(part.size for part in rows)
        told = self.call.relation(
            (q.origin, q.layout, rows),
            (k.origin, k.layout, keys),
            own_keys=roles.own_keys,
            contracted=q.axes(self.product.contracted),
            shared=[(q.axis(letter), k.axis(letter)) for letter in self.product.shared],
        )
        if not is_whole and told.get("query_positions") is not None:
            told |= {"query_positions": None, "positions_known": False}
        return told

    def _changed(self, given: dict[str, Any], start: int, kept: int) -> dict[str, Any]:
        """Return what stands for the scores where the model has changed the weights after the softmax.

        Rows that may see nothing, which the model sets to 0, are no change.

        Raises:
            NotUnderstoodError: when the weights do not sum to 1, and heads were not mixed.
        """
        weights, layout = self.tracked.weights, self.tracked.layout
        assert weights is not None
        assert layout is not None
        columns = [at for at, axis in enumerate(layout.axes) if any(p.source is self.softmax.columns for p in axis)]
        if len(columns) != 1 or len(layout.axes[columns[0]]) != 1:
            raise NotUnderstoodError("after the softmax its weights were given axes that cannot be told apart")
        # half precision rounds to three digits
        tolerance = 1e-5 if weights.dtype in (torch.float32, torch.float64) else 1e-2
        used = self._roles(layout, weights.shape, columns[0]).arranged(weights).float()  # (B, H, Q, K)
        part = layout.axes[columns[0]][0]
        used = used[..., start - part.start : start - part.start + kept]
        before = given["model_scores"].float().softmax(-1)[..., :kept]
        total = used.sum(-1, keepdim=True)
        is_nothing = ~(total.abs() > tolerance)  # also NaN
        of_softmax = {p.source for p in self.softmax.layout.parts} | {self.softmax.columns}
        is_mixed = any(p.source not in of_softmax for p in layout.parts)
        if used.shape == before.shape:
            is_same = ((used - before).abs() <= tolerance) | (used == 0) & (before <= tolerance)
            if bool((is_same | is_nothing).all()):
                return given
        # the sum adds up the rounding of all columns
        sums_to_1 = ((total - 1).abs() <= 100 * tolerance) | is_nothing
        if bool(sums_to_1.all()) and bool((used >= 0).all()):
            return {"model_scores": used.log()}
        if is_mixed:
            return {"model_weights": used}
        raise NotUnderstoodError("after the softmax its weights were changed to others that do not sum to 1")


def _sources(axis: Axis) -> set[Source]:
    """Collect the sources of an axis, and those that lie in them."""
    return {inner for part in axis for inner in (part.source, *part.source.made_of)} | {
        other.source for part in axis for _, segment in part.source.segments for other in segment
    }


def _parts(layout: Layout, columns: int) -> list[Any]:
    """List the parts as Roles numbers them: the axis of the columns is one."""
    return [part for at, axis in enumerate(layout.axes) for part in ([None] if at == columns else axis)]


def _columns_last(scores: Tensor, start: int, kept: int) -> Tensor:
    """Return scores with the columns that the values never meet last."""
    if scores.shape[-1] == kept:
        return scores
    stop = start + kept
    return torch.cat([scores[..., start:stop], scores[..., :start], scores[..., stop:]], -1)
