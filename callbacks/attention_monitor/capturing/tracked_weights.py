"""The result of a softmax, followed through what a model does to it until it meets the values."""

import weakref
from dataclasses import dataclass, replace

from torch import Tensor

from .attention_call import NotUnderstoodError
from .axes import Layout, Part, Source, SourceKind, Tag, is_features


@dataclass(eq=False)
class SoftmaxOutcome:
    """What becomes of a softmax; outlives its tensors.

    Attributes:
        path: path of the enclosing attention module, or None.
        met_values: whether its result has been multiplied with values.
        reason: why it is no attention that can be read, where that is known.
    """

    path: str | None
    met_values: bool = False
    reason: str | None = None


@dataclass(frozen=True, eq=False)
class SoftmaxInput:
    """A softmax whose result may turn out to be attention, and what went into it.

    Attributes:
        scores: what went in, with any axes.
        layout: what its axes are made of.
        result: what came out.
        versions: versions of both tensors, which tell whether they have been written to since.
        axis: axis over which the softmax was taken.
        columns: that axis in the result.
        tag: product of queries and keys, and which of them has the axis; None where no product was seen.
        outcome: what becomes of the softmax.
    """

    scores: Tensor
    layout: Layout
    result: weakref.ref[Tensor]
    versions: tuple[int, int]
    axis: int
    columns: Source
    tag: Tag | None
    outcome: SoftmaxOutcome

    @classmethod
    def of(
        cls,
        given: Tensor,
        layout: Layout,
        result: Tensor,
        axis: int,
        tag: Tag | None,
        outcome: SoftmaxOutcome,
    ) -> "SoftmaxInput":
        """Remember a softmax that has just been taken of ``given``."""
        # softmax(scores, out=scores) leaves the scores up to a constant
        scores = result.detach().log() if result.data_ptr() == given.data_ptr() else given.detach()
        of_axis = layout.axes[axis]
        kind = SourceKind.FEATURES if is_features(of_axis) else SourceKind.PLACES
        columns = Source(given.shape[axis], kind, segments=((0, of_axis),), is_columns=True)
        versions = _version(scores), _version(result)
        return cls(scores, layout, weakref.ref(result), versions, axis, columns, tag, outcome)

    @property
    def result_layout(self) -> Layout:
        """What the axes of the result are made of."""
        axes = list(self.layout.axes)
        axes[self.axis] = (Part(self.columns, self.columns.size),)
        return Layout(tuple(axes), self.layout.fixed)

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
    """Attached to the result of a softmax, and to what is made of it as long as its columns are there.

    Attributes:
        softmax: the softmax.
        weights: what the model made of the result, before dropout; None: it left the result as it was.
        layout: what the axes of ``weights`` are made of.
    """

    softmax: SoftmaxInput
    weights: Tensor | None = None
    layout: Layout | None = None

    def handed_on(self, tensor: Tensor, layout: Layout, changed: bool) -> "TrackedWeights | None":
        """Return what is attached to a tensor that was computed from this one; None when it is something else."""
        is_there = any(part.source is self.softmax.columns for part in layout.parts)
        if not is_there or self.softmax.outcome.met_values or not tensor.is_floating_point():
            return None
        return replace(self, weights=tensor.detach(), layout=layout) if changed else self


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
