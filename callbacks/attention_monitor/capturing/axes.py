"""What each axis of a tensor is made of: how heads, sequences, windows, positions and channels are told apart.

Every axis is a list of parts. A part is a run of entries of a source - an axis that was there when a tensor came in, or
the features that a projection made - with a stride and a start, as in a strided array: splitting an axis splits its
parts, merging puts parts side by side, a slice moves the start. So two parts of one source say which entry of it
stands where, however their tensors were cut, merged and turned.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, NamedTuple

from torch import Tensor


class SourceKind(Enum):
    """What is known of a source."""

    PLACES = auto()  # an axis of an input: sequences, positions, rows, columns; nothing says that it is features
    FEATURES = auto()  # made by a projection
    COPIES = auto()  # made by repeating: all entries are the same
    UNSEEN = auto()  # a function that is not followed has made it


_number = itertools.count()


@dataclass(eq=False, slots=True)
class Source:
    """Where the entries of an axis come from.

    Attributes:
        size: number of entries.
        kind: what is known of it.
        made_of: sources that it was computed from.
        weight: what identifies the weight that made features.
        segments: first entry, and the axis that lies there entry by entry: what was put together, or written in.
        picked: the axis that entries were picked from.
        picks: number of each entry in ``picked``, where it is the same everywhere.
        is_columns: whether these are the columns of a softmax's result.
        number: grows with time.
    """

    size: int
    kind: SourceKind = SourceKind.PLACES
    made_of: "tuple[Source, ...]" = ()
    weight: Any = None
    segments: "tuple[tuple[int, Axis], ...]" = ()
    picked: "Axis | None" = None
    picks: Tensor | None = None
    is_columns: bool = False
    number: int = field(default_factory=lambda: next(_number))

    def is_made_of(self, other: "Source") -> bool:
        """Whether it is another source, or was computed from it."""
        return self is other or any(source.is_made_of(other) for source in self.made_of)


class Tag(NamedTuple):
    """That a part is an axis of one of the two factors of a product alone.

    Attributes:
        product: the product.
        side: 0 for the first factor, 1 for the second.
    """

    product: Any
    side: int


class Part(NamedTuple):
    """Some entries of a source along an axis: numbers ``start + stride * i`` for i < size, the starts of parts added.

    Attributes:
        source: the source.
        size: number of entries.
        stride: step in the source from one entry to the next.
        start: entry of the source at which it begins.
        tag: the product of which it is an axis of one factor alone; None elsewhere.
    """

    source: Source
    size: int
    stride: int = 1
    start: int = 0
    tag: Tag | None = None


Axis = tuple[Part, ...]  # parts, the one that varies slowest first; empty for an axis of one entry


class Layout(NamedTuple):
    """What the axes of a tensor are made of.

    Attributes:
        axes: parts of each axis.
        fixed: entry of each source of which one was selected, or there is but one, so that it has no axis.
    """

    axes: tuple[Axis, ...]
    fixed: tuple[tuple[Source, int], ...] = ()

    def untagged(self) -> "Layout":
        """Return the layout without the products that axes were those of one factor of."""
        return Layout(tuple(map(untagged, self.axes)), self.fixed)

    @property
    def parts(self) -> Iterator[Part]:
        """All parts, from the first axis to the last."""
        return itertools.chain.from_iterable(self.axes)


def axis_of(source: Source) -> Axis:
    """Return the axis that is a whole source."""
    return (Part(source, source.size),) if source.size != 1 else ()


def new_layout(shape: Sequence[int], kind: SourceKind = SourceKind.PLACES, made_of: tuple[Source, ...] = ()) -> Layout:
    """Return a layout in which every axis is a source of its own."""
    sources = [Source(size, kind, made_of) for size in shape]
    fixed = tuple([(source, 0) for source in sources if source.size == 1 and kind is SourceKind.PLACES])
    return Layout(tuple(map(axis_of, sources)), fixed)


def fixed_in(layouts: Sequence[Layout]) -> tuple[tuple[Source, int], ...]:
    """Return what is fixed in tensors that are added or multiplied, without what is fixed in different ways."""
    if len(layouts) == 1:
        return layouts[0].fixed
    found: dict[Source, int | None] = {}
    for layout in layouts:
        for source, entry in layout.fixed:
            found[source] = entry if found.get(source, entry) == entry else None
    return tuple([(source, entry) for source, entry in found.items() if entry is not None])


def singles_of(layout: Layout, besides: Layout | None = None) -> Axis:
    """Return what is fixed in a layout, besides what is in another one, as an axis of one entry."""
    others = {source for source, _ in besides.fixed} if besides is not None else set()
    return tuple([Part(source, 1, 1, entry) for source, entry in layout.fixed if source not in others])


def sources_of(axis: Iterable[Part]) -> tuple[Source, ...]:
    """List the sources of an axis, each once."""
    return tuple(dict.fromkeys(part.source for part in axis))


def is_features(axis: Axis) -> bool:
    """Whether an axis is made of features alone."""
    return bool(axis) and all(part.source.kind is SourceKind.FEATURES for part in axis)


def untagged(axis: Axis) -> Axis:
    """Return an axis without the product that it was an axis of."""
    return tuple([part._replace(tag=None) if part.tag is not None else part for part in axis])


def joined(parts: Sequence[Part]) -> Axis:
    """Put parts that continue one another together."""
    if len(parts) < 2:
        return tuple(parts)
    result = [parts[0]]
    for part in parts[1:]:
        last = result[-1]
        if last.source is part.source and last.tag is part.tag and last.stride == part.size * part.stride:
            result[-1] = Part(part.source, last.size * part.size, part.stride, last.start + part.start, part.tag)
        else:
            result.append(part)
    return tuple(result)


def reshaped(layout: Layout, shape: Sequence[int]) -> Layout:
    """Return the layout of a tensor whose entries have been given another shape, in their order.

    Axes that cut through parts in a way that their sizes do not allow are unseen.
    """
    if 0 in shape:
        return new_layout(shape, SourceKind.UNSEEN)
    todo = list(reversed(list(layout.parts)))
    axes: list[Axis] = []
    for at, size in enumerate(shape):
        parts: list[Part] = []
        missing = size
        while missing > 1:
            if not todo:
                return Layout((*axes, *new_layout(shape[at:], SourceKind.UNSEEN).axes), layout.fixed)
            part = todo.pop()
            if missing % part.size == 0:
                parts.append(part)
                missing //= part.size
            elif part.size % missing == 0:
                inner = part.size // missing
                parts.append(part._replace(size=missing, stride=part.stride * inner))
                todo.append(part._replace(size=inner, start=0))
                missing = 1
            else:
                rest = new_layout(shape[at:], SourceKind.UNSEEN, sources_of(layout.parts))
                return Layout((*axes, *rest.axes), layout.fixed)
        axes.append(joined(parts))
    return Layout(tuple(axes), layout.fixed)


def part_sizes(layout: Layout) -> list[int]:
    """List the sizes of all parts: the shape in which every part is an axis of its own."""
    return [part.size for part in layout.parts]


def tag_of(axis: Axis) -> Tag | None:
    """Find the product that an axis belongs to; of one that was put together, or of columns, by what lies in it."""
    for part in axis:
        if part.tag is not None:
            return part.tag
        for _, inner in part.source.segments:
            if (tag := tag_of(inner)) is not None:
                return tag
    return None
