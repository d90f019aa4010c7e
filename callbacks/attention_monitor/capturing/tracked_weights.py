"""The result of a softmax, followed through what a model does to it until it meets the values.

Shapes: B sequences, H query heads, Q queries, K keys.
"""

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .provenance import Origin
from .recognisers.base import NotUnderstoodError


@dataclass(eq=False)
class SoftmaxOutcome:
    """What becomes of a softmax; outlives its tensors.

    Attributes:
        path: path of the enclosing attention module, or None.
        met_values: whether its result has been multiplied with values.
    """

    path: str | None
    met_values: bool = False


@dataclass(frozen=True, eq=False)
class SoftmaxInput:
    """A softmax whose result may turn out to be attention, and what went into it.

    Attributes:
        scores: what went in, with any axes.
        result: what came out.
        versions: versions of both tensors, which tell whether they have been written to since.
        axis: axis over which the softmax was taken.
        product: origins of queries and keys; None where they were not seen.
        outcome: what becomes of the softmax.
    """

    scores: Tensor
    result: weakref.ref[Tensor]
    versions: tuple[int, int]
    axis: int
    product: tuple[Origin, Origin] | None
    outcome: SoftmaxOutcome

    @classmethod
    def of(
        cls, given: Tensor, result: Tensor, axis: int, product: tuple[Origin, Origin] | None, outcome: SoftmaxOutcome
    ) -> "SoftmaxInput":
        """Remember a softmax that has just been taken of ``given``."""
        # softmax(scores, out=scores) leaves the scores up to a constant
        scores = result.detach().log() if result.data_ptr() == given.data_ptr() else given.detach()
        return cls(scores, weakref.ref(result), (_version(scores), _version(result)), axis, product, outcome)

    def readable_scores(self) -> Tensor:
        """Return the scores, or others with the same softmax where they were overwritten.

        Raises:
            NotUnderstoodError: when scores and result both were overwritten.
        """
        if _version(self.scores) == self.versions[0]:
            return self.scores
        result = self.result()
        if result is None or _version(result) != self.versions[1]:
            raise NotUnderstoodError("its scores were overwritten before they met the values")
        return result.detach().log()  # the scores up to a constant


@dataclass(frozen=True, eq=False)
class TrackedWeights:
    """Attached to the result of a softmax, and to what is made of it by dropout, masks, casts, views, left-out columns.

    Attributes:
        softmax: the softmax.
        shape: shape of the tensor that this is attached to.
        start: first column of the softmax that is still there.
        weights: what the model made of the result, before dropout; None: it left the result as it was.
    """

    softmax: SoftmaxInput
    shape: Sequence[int]
    start: int = 0
    weights: Tensor | None = None

    def handed_on(self, tensor: Tensor, changed: bool) -> "TrackedWeights | None":
        """Return what is attached to a tensor that was computed from this one; None when it is something else."""
        if self.softmax.outcome.met_values or tensor.dim() < 2 or not tensor.is_floating_point():
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

    def changed_scores(self, scores: Tensor, columns: int, kept: int) -> Tensor | None:
        """Return scores whose softmax are the weights that the model used, where these are not that of its own scores.

        Args:
            scores: what went into the softmax.
            columns: axis of the keys.
            kept: columns that meet the values.

        Returns:
            changed: scores with the axes of ``scores`` and ``kept`` columns. None: the model used the softmax of its
                own scores, but for rows that may see nothing, which are set to 0.

        Raises:
            NotUnderstoodError: when the weights do not sum to 1.
        """
        if self.weights is None:
            return None
        softmax = scores.float().softmax(columns).narrow(columns, self.start, kept)
        # half precision rounds to three digits
        tolerance = 1e-5 if self.weights.dtype in (torch.float32, torch.float64) else 1e-2
        weights = self.weights.float()
        if weights.numel() != softmax.numel() or weights.dim() != softmax.dim():
            weights = weights.reshape(softmax.shape) if weights.numel() == softmax.numel() else softmax
        total = weights.sum(columns, keepdim=True)
        is_nothing = ~(total.abs() > tolerance)  # also NaN
        is_same = ((weights - softmax).abs() <= tolerance) | (weights == 0) & (softmax <= tolerance)
        if bool((is_same | is_nothing).all()):
            return None
        # the sum adds up the rounding of all columns
        sums_to_1 = ((total - 1).abs() <= 100 * tolerance) | is_nothing
        if bool(sums_to_1.all()) and bool((weights >= 0).all()):
            return weights.log()
        raise NotUnderstoodError("after the softmax its weights were changed to others that do not sum to 1")


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
