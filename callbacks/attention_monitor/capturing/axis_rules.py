"""What the functions of torch do to axes: one rule for each kind of function."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .axes import (
    Axis,
    Layout,
    Part,
    Source,
    SourceKind,
    axis_of,
    fixed_in,
    is_features,
    joined,
    new_layout,
    reshaped,
    singles_of,
    sources_of,
)
from .origin import Origin
from .products import Factor, Product, best_axis, contract


class Known(Protocol):
    """What is known of the tensors of a forward."""

    def of(self, tensor: Tensor) -> Origin:
        """Return where a tensor comes from."""

    def is_data(self, tensor: Tensor) -> bool:
        """Whether a tensor depends on data, and not on weights alone."""

    def layout_of(self, tensor: Tensor) -> Layout:
        """Return what the axes of a tensor are made of."""

    def same_source(self, how: Any, make: Callable[[], Source]) -> Source:
        """Return the source that was made in a way, or make it now."""


@dataclass(slots=True)
class Step:
    """One function that was called, and what it made.

    Attributes:
        func: the function.
        args: its arguments.
        kwargs: its arguments by name.
        given: tensors among the arguments.
        made: tensors among the results.
        origins: where tensors come from.
        product: the product that it is, once its rule has found one.
    """

    func: Any
    args: Sequence[Any]
    kwargs: dict[str, Any]
    given: list[Tensor]
    made: Sequence[Tensor]
    origins: Known
    product: Product | None = None

    def argument(self, at: int, name: str, default: Any = None) -> Any:
        """Return an argument by its place or its name."""
        return self.args[at] if len(self.args) > at else self.kwargs.get(name, default)

    def layout(self, tensor: Tensor) -> Layout:
        """Return what the axes of a tensor are made of."""
        return self.origins.layout_of(tensor)

    def derived(self, axis: Axis, size: int, *how: Any, segments: Sequence[tuple[int, Axis]] = ()) -> Axis:
        """Return an axis whose entries are made of others, the same one where the same was made of the same.

        Args:
            axis: what it is made of.
            size: number of its entries.
            how: what was done.
            segments: where entries of other axes lie in it.
        """
        if size == 1:
            return ()
        kind = SourceKind.FEATURES if is_features(axis) else SourceKind.PLACES
        if not axis or any(part.source.kind is SourceKind.UNSEEN for part in axis):
            kind = SourceKind.UNSEEN

        def make() -> Source:
            return Source(size, kind, sources_of(axis), segments=tuple(segments))

        return axis_of(self.origins.same_source((axis, size, *how), make))


Rule = Callable[[Step], Layout | Sequence[Layout]]


def layouts_of(step: Step) -> Sequence[Layout]:
    """Return the layout of each tensor that a function has made; where no rule knows, its axes are unseen."""
    rule = RULES.get(step.func, elementwise)
    try:
        found = rule(step)
    except Exception:  # arguments that a rule does not expect: not known is not wrong
        return [new_layout(tensor.shape, SourceKind.UNSEEN) for tensor in step.made]
    layouts = [found] if isinstance(found, Layout) else found
    return [
        layout if _fits(layout, tensor.shape) else new_layout(tensor.shape, SourceKind.UNSEEN)
        for layout, tensor in zip(layouts, step.made, strict=True)
    ]


def _fits(layout: Layout, shape: torch.Size) -> bool:
    axes = layout.axes
    if len(axes) != len(shape):
        return False
    for axis, size in zip(axes, shape, strict=True):
        if (axis[0].size if len(axis) == 1 else _size(axis)) != size:  # on every function of a forward
            return False
    return True


def elementwise(step: Step) -> Sequence[Layout]:
    """Axes stay what they are; of several tensors, each axis is that of the one that says most."""
    if not step.given:
        return [new_layout(made.shape) for made in step.made]  # a constant
    return [_broadcast(step, step.given, made.shape) for made in step.made]


def _broadcast(step: Step, given: Sequence[Tensor], shape: torch.Size) -> Layout:
    n = len(shape)
    if len(given) == 1 and given[0].shape == shape:
        return step.layout(given[0])
    of_data = [x for x in given if step.origins.of(x).is_data] or given
    layouts = [(x.shape, step.layout(x)) for x in of_data if x.dim() <= n]
    if len(layouts) == 1 and layouts[0][0] == shape:
        return layouts[0][1]
    axes: list[Axis] = []
    for at in range(n):
        fitting = [
            layout.axes[at - n]
            for sizes, layout in layouts
            if n - at <= len(sizes) and sizes[at - n] == shape[at] and shape[at] != 1
        ]
        if fitting:
            axes.append(best_axis(fitting))
        else:
            axes.append(axis_of(Source(shape[at], SourceKind.UNSEEN)))
    return Layout(tuple(axes), fixed_in([layout for _, layout in layouts]))


def _reshape_in_place(step: Step) -> Layout:
    """A tensor that has another number of axes now than it had when its layout was noted."""
    layout = step.origins.of(step.args[0]).layout
    return reshaped(layout, step.made[0].shape) if layout is not None else new_layout(step.made[0].shape)


def _first(step: Step) -> Layout:
    """Axes of the first argument: the others say which type or device it is to have."""
    return step.layout(step.args[0])


def _reshape(step: Step) -> Sequence[Layout]:
    layout = step.layout(step.args[0])
    return [reshaped(layout, made.shape) for made in step.made]


_IN_PLACE = (Tensor.transpose_, Tensor.swapaxes_, Tensor.swapdims_, Tensor.t_)

_SIZES = (2, 3, 5, 7, 11, 13, 17, 19)


@lru_cache(maxsize=64)
def _stand_in(n_axes: int, dtype: torch.dtype) -> Tensor:
    return torch.zeros(_SIZES[:n_axes], dtype=dtype, device="cpu")


def _by_stand_in(step: Step) -> Sequence[Layout]:
    """Ask the function itself what becomes of axes, on a small tensor whose sizes are all different."""
    x = step.args[0]
    if len(step.given) > 1:  # max(x, y)
        return elementwise(step)
    layout = step.layout(x)
    small = _stand_in(x.dim(), x.dtype)
    small = small.clone() if step.func in _IN_PLACE else small
    small = step.func(small, *step.args[1:], **step.kwargs)
    results = [small] if isinstance(small, Tensor) else list(small)
    return [
        Layout(tuple([layout.axes[_SIZES.index(size)] if size != 1 else () for size in result.shape]), layout.fixed)
        for result in results
    ]


def _recurrent(step: Step) -> Sequence[Layout]:
    """Outputs of an LSTM or GRU: places stay, features are new; states are of no place."""
    x, made = step.layout(step.args[0]), step.made[0]
    out = Layout((*x.axes[:-1], axis_of(Source(made.shape[-1], SourceKind.FEATURES))))
    return [out, *(new_layout(state.shape, SourceKind.UNSEEN) for state in step.made[1:])]


def _cell(step: Step) -> Sequence[Layout]:
    """A state of a recurrent cell is of no place, whatever it was begun with."""
    batch, weight = step.layout(step.args[0]).axes[:-1], step.args[2]
    return [Layout((*batch, _features(step, made.shape[-1], (), weight))) for made in step.made]


# Choosing


def _sliced(axis: Axis, start: int, stop: int, stride: int = 1) -> Axis:
    n = len(range(start, stop, stride))
    if n == 1:
        return ()  # see _getitem: where it lies is in what is fixed
    if len(axis) == 1:
        part = axis[0]
        return (part._replace(size=n, stride=part.stride * stride, start=part.start + start * part.stride),)
    inner = _size(axis[1:])
    if axis and stride == 1 and start % inner == 0 and stop % inner == 0:
        outer = axis[0]
        cut = outer._replace(size=n // inner, start=outer.start + start // inner * outer.stride)
        return (*((cut,) if cut.size > 1 else ()), *axis[1:])
    return _picked(axis, n, torch.arange(start, stop, stride, device="cpu"))


def _picked(axis: Axis, n: int, picks: Tensor | None) -> Axis:
    if n == 1:
        return ()
    kinds = {part.source.kind for part in axis}
    kind = kinds.pop() if len(kinds) == 1 else SourceKind.UNSEEN
    return axis_of(Source(n, kind, sources_of(axis), picked=axis, picks=picks))


def _fixed_at(axis: Axis, index: int) -> tuple[tuple[Source, int], ...]:
    """Say which entries of sources are at one place of an axis."""
    found: dict[Source, int] = {}
    for part in reversed(axis):
        index, i = divmod(index, part.size)
        found[part.source] = found.get(part.source, 0) + part.start + part.stride * i
    return tuple(found.items())


def _select(layout: Layout, at: int, index: int, size: int) -> Layout:
    axis = layout.axes[at]
    fixed = _fixed_too(layout, _fixed_at(axis, index % size))
    return Layout((*layout.axes[:at], *layout.axes[at + 1 :]), fixed)


def _fixed_too(layout: Layout, others: Sequence[tuple[Source, int]]) -> tuple[tuple[Source, int], ...]:
    """Return what is fixed once more is: of two parts of a source the entries add up."""
    found = dict(layout.fixed)
    for source, entry in others:
        found[source] = found.get(source, 0) + entry
    return tuple(found.items())


def _slice(layout: Layout, at: int, start: int, stop: int, stride: int = 1) -> Layout:
    axis = layout.axes[at]
    cut = _sliced(axis, start, stop, stride)
    fixed = layout.fixed
    if len(range(start, stop, stride)) == 1:
        fixed = _fixed_too(layout, _fixed_at(axis, start))
    return Layout((*layout.axes[:at], cut, *layout.axes[at + 1 :]), fixed)


def _getitem(step: Step) -> Layout:
    x, index = step.args[0], step.args[1]
    return _indexed(step, x, index)


def _indexed(step: Step, x: Tensor, index: Any) -> Layout:
    indices = list(index) if isinstance(index, tuple) else [index]
    n_used = sum(
        i.dim() if isinstance(i, Tensor) and i.dtype == torch.bool else 1
        for i in indices
        if i is not None and i is not Ellipsis
    )
    if any(i is Ellipsis for i in indices):
        at = next(k for k, i in enumerate(indices) if i is Ellipsis)
        indices[at : at + 1] = [slice(None)] * (x.dim() - n_used)
    layout, at = step.layout(x), 0
    advanced: list[tuple[int, Tensor]] = []
    for i in indices:
        if i is None:
            layout = Layout((*layout.axes[:at], (), *layout.axes[at:]), layout.fixed)
            at += 1
        elif isinstance(i, bool):
            raise NotImplementedError
        elif isinstance(i, int):
            layout = _select(layout, at, i, _size(layout.axes[at]))
        elif isinstance(i, slice):
            size = _size(layout.axes[at])
            if i != slice(None):
                layout = _slice(layout, at, *i.indices(size))
            at += 1
        else:
            picks = i if isinstance(i, Tensor) else torch.as_tensor(i)
            if picks.dtype == torch.bool:
                if picks.dim() != 1:
                    raise NotImplementedError
                picks = picks.nonzero().flatten()
            if picks.dim() == 0:
                raise NotImplementedError
            advanced.append((at, picks))
            at += 1
    return _advanced(step, layout, advanced) if advanced else layout


def _size(axis: Axis) -> int:
    return math.prod([part.size for part in axis])


def _advanced(step: Step, layout: Layout, indices: Sequence[tuple[int, Tensor]]) -> Layout:
    """Tensors as indices: an index that counts an axis through leaves it what it is, others pick from theirs."""
    shapes = [picks.shape for _, picks in indices]
    shape = shapes[0] if len(shapes) == 1 else torch.broadcast_shapes(*shapes)
    n = len(shape)
    axes: list[Axis] = []
    for d in range(n):
        here = [(at, picks) for at, picks in indices if picks.dim() >= n - d and picks.shape[d - n] > 1]
        counting = [at for at, picks in here if _counts(step, picks, d - n, layout.axes[at])]
        if shape[d] == 1:
            axes.append(())
        elif counting:
            axes.append(layout.axes[counting[0]])
        else:
            from_axes = [at for at, _ in here]
            source_axis = tuple(part for at in from_axes for part in layout.axes[at])
            picks = here[0][1] if len(here) == 1 and here[0][1].numel() == shape[d] else None
            axes.append(_picked(source_axis, shape[d], None if picks is None else picks.detach().flatten()))
    places = [at for at, _ in indices]
    together = places == list(range(places[0], places[0] + len(places)))
    rest = [axis for at, axis in enumerate(layout.axes) if at not in places]
    before = places[0] if together else 0
    fixed = layout.fixed
    if n == 1 and shape[0] == 1 and len(indices) == 1:
        fixed = _fixed_too(layout, _fixed_at(layout.axes[places[0]], int(indices[0][1])))
    return Layout((*rest[:before], *axes, *rest[before:]), fixed)


def _counts(step: Step, picks: Tensor, dim: int, axis: Axis) -> bool:
    size = _size(axis)
    if picks.shape[dim] != size or picks.numel() != size or step.origins.is_data(picks):
        return False
    return bool((picks.flatten() == torch.arange(size, device=picks.device)).all())


def _narrow(step: Step) -> Layout:
    x, dim = step.args[0], step.argument(1, "dim")
    start, length = step.argument(2, "start"), step.argument(3, "length")
    at = dim % x.dim()
    start = int(start) % x.shape[at] if start < 0 else int(start)
    return _slice(step.layout(x), at, start, start + length)


def _select_one(step: Step) -> Layout:
    x, dim, index = step.args[0], step.argument(1, "dim"), step.argument(2, "index")
    return _select(step.layout(x), dim % x.dim(), index, x.shape[dim])


def _index_select(step: Step) -> Layout:
    x, dim, index = step.args[0], step.argument(1, "dim"), step.argument(2, "index")
    indices = [slice(None)] * x.dim()
    indices[dim % x.dim()] = index
    return _indexed(step, x, tuple(indices))


def _gather(step: Step) -> Layout:
    x, dim, index = step.args[0], step.argument(1, "dim"), step.argument(2, "index")
    layout = step.layout(x)
    axes = [
        axis if size == index.shape[at] else _picked(axis, index.shape[at], None)
        for at, (axis, size) in enumerate(zip(layout.axes, x.shape, strict=True))
    ]
    axes[dim % x.dim()] = _picked(layout.axes[dim], index.shape[dim], None)
    return Layout(tuple(axes), layout.fixed)


def _pieces(step: Step) -> Sequence[Layout]:
    """Chunks of an axis, one after the other."""
    x = step.args[0]
    dim = step.argument(2, "dim", 0) % x.dim()
    start, layouts = 0, []
    for made in step.made:
        layouts.append(_slice(step.layout(x), dim, start, start + made.shape[dim]))
        start += made.shape[dim]
    return layouts


def _unbind(step: Step) -> Sequence[Layout]:
    x, dim = step.args[0], step.argument(1, "dim", 0)
    layout = step.layout(x)
    return [_select(layout, dim % x.dim(), i, x.shape[dim]) for i in range(len(step.made))]


def _top(step: Step) -> Sequence[Layout]:
    """Entries in another order: which ones is not known."""
    x = step.args[0]
    dim = step.kwargs.get("dim", step.args[2] if step.func in _TOPK and len(step.args) > 2 else None)
    dim = step.args[1] if dim is None and step.func not in _TOPK and len(step.args) > 1 else dim
    dim = (-1 if dim is None else dim) % x.dim()
    layout = step.layout(x)
    axes = list(layout.axes)
    axes[dim] = _picked(axes[dim], step.made[0].shape[dim], None)
    return [Layout(tuple(axes), layout.fixed)] * len(step.made)


_TOPK = (torch.topk, Tensor.topk)


# Repeating and putting together


def _copies(n: int) -> Axis:
    return axis_of(Source(n, SourceKind.COPIES))


def _expand(step: Step) -> Layout:
    x, made = step.args[0], step.made[0]
    layout, missing = step.layout(x), made.dim() - x.dim()
    axes = [_copies(size) for size in made.shape[:missing]]
    for axis, was, size in zip(layout.axes, x.shape, made.shape[missing:], strict=True):
        axes.append(axis if was == size else _copies(size))
    return Layout(tuple(axes), layout.fixed)


def _repeat(step: Step) -> Layout:
    x, made = step.args[0], step.made[0]
    layout, missing = step.layout(x), made.dim() - x.dim()
    axes = [_copies(size) for size in made.shape[:missing]]
    for axis, was, size in zip(layout.axes, x.shape, made.shape[missing:], strict=True):
        axes.append((*_copies(size // was), *axis))
    return Layout(tuple(axes), layout.fixed)


def _repeat_interleave(step: Step) -> Layout:
    x, dim = step.args[0], step.argument(2, "dim")
    times = step.argument(1, "repeats")
    if not isinstance(times, int) or dim is None:
        raise NotImplementedError
    layout = step.layout(x)
    axes = list(layout.axes)
    axes[dim % x.dim()] = (*axes[dim % x.dim()], *_copies(times))
    return Layout(tuple(axes), layout.fixed)


def _cat(step: Step) -> Layout:
    pieces: Sequence[Tensor] = step.argument(0, "tensors")
    made, dim = step.made[0], step.argument(1, "dim", step.kwargs.get("axis", 0))
    dim %= made.dim()
    pieces = [piece for piece in pieces if piece.dim() == made.dim() and piece.shape[dim] > 0]
    if len(pieces) == 1:
        return step.layout(pieces[0])
    layouts = [step.layout(piece) for piece in pieces]
    whole = _merged(step, pieces, layouts, [size if at != dim else 1 for at, size in enumerate(made.shape)])
    sizes = [piece.shape[dim] for piece in pieces]
    axes = list(whole.axes)
    continued = _continued(layouts, dim)
    if continued is not None:
        source = continued.source
        axes = [tuple([p._replace(start=0) if p.source is source else p for p in axis]) for axis in axes]
        axes[dim] = (continued,)
        return Layout(tuple(axes), tuple(entry for entry in whole.fixed if entry[0] is not source))
    along = [layout.axes[dim] for layout in layouts]
    if dim == 0 and len(pieces) > 1 and all(axis == along[0] for axis in along) and _are_heads(layouts):
        axes[dim] = (*axis_of(Source(len(pieces), SourceKind.FEATURES)), *along[0])
        return Layout(tuple(axes), whole.fixed)
    if len(pieces) > 1 and all(axis == along[0] for axis in along) and (step_of := _windows(layouts)) is not None:
        axes[dim] = (step_of, *along[0])  # windows, one after the other
        return Layout(tuple(axes), whole.fixed)
    starts = list(itertools.accumulate(sizes, initial=0))
    segments = [
        (start, axis or singles_of(layout, whole))
        for start, axis, layout in zip(starts, along, layouts, strict=False)
        if axis or singles_of(layout, whole)
    ]
    # what is one entry long has no parts; where it lies in its source says that two tensors were made alike
    alone = tuple([layout.fixed if not axis else () for layout, axis in zip(layouts, along, strict=True)])
    made_of = tuple([part for axis in along for part in axis])
    axes[dim] = step.derived(made_of, made.shape[dim], "cat", tuple(sizes), alone, segments=segments)
    return Layout(tuple(axes), whole.fixed)


def _windows(layouts: Sequence[Layout]) -> Part | None:
    """Return the part that tensors are, one after the other, which are alike but for where they lie in one source."""
    starts: dict[Source, list[int]] = {}
    for layout in layouts:
        for source in {part.source for part in layout.parts if part.source.kind is SourceKind.PLACES}:
            starts.setdefault(source, []).append(sum([p.start for p in layout.parts if p.source is source]))
    moving = [source for source, at in starts.items() if len(set(at)) > 1]
    if len(moving) != 1 or any(len(at) != len(layouts) for at in starts.values()):
        return None
    at = starts[moving[0]]
    strides = {after - before for before, after in itertools.pairwise(at)}
    return Part(moving[0], len(layouts), strides.pop()) if len(strides) == 1 else None


def _merged(step: Step, pieces: Sequence[Tensor], layouts: Sequence[Layout], shape: Sequence[int]) -> Layout:
    """Return the axes that tensors which are put together have in common; those of size 1 are left to the caller."""
    data = [step.origins.is_data(piece) for piece in pieces]
    some = [layout for layout, is_data in zip(layouts, data, strict=True) if is_data] or list(layouts)
    axes = [best_axis([layout.axes[at] for layout in some]) if size != 1 else () for at, size in enumerate(shape)]
    fixed = set(some[0].fixed).intersection(*(layout.fixed for layout in some[1:]))
    return Layout(tuple(axes), tuple(fixed))


def _continued(layouts: Sequence[Layout], dim: int) -> Part | None:
    """Return the part that pieces make together where each goes on where the one before ends."""
    firsts = [layout.axes[dim] for layout in layouts]
    if any(len(axis) > 1 for axis in firsts) or len(layouts) < 2:
        return None
    like = next((axis[0] for axis in firsts if axis), None)
    if like is None:  # of one entry each
        second = dict(layouts[1].fixed)
        next_to = [Part(source, 1) for source, at in layouts[0].fixed if second.get(source) == at + 1]
        if not next_to:
            return None
        like = next_to[0]
    begin = at = None
    n = 0
    for layout, axis in zip(layouts, firsts, strict=True):
        part = axis[0] if axis else None
        if part is not None and (
            part.source is not like.source or part.stride != like.stride or part.tag is not like.tag
        ):
            return None
        starts = [p.start for other in layout.axes for p in other if p.source is like.source]
        starts += [entry for source, entry in layout.fixed if source is like.source]
        if not starts:
            return None
        start = sum(starts)
        if at is not None and start != at:
            return None
        begin = start if begin is None else begin
        size = 1 if part is None else part.size
        at, n = start + size * like.stride, n + size
    return None if begin is None else Part(like.source, n, like.stride, begin, like.tag)


def _are_heads(layouts: Sequence[Layout]) -> bool:
    """Whether tensors are the same places projected differently: heads that were made one by one."""
    seen = []
    for layout in layouts:
        features = [(part.source, part.start) for part in layout.parts if part.source.kind is SourceKind.FEATURES]
        fixed = [(source, at) for source, at in layout.fixed if source.kind is SourceKind.FEATURES]
        if not features:
            return False
        seen.append(tuple(sorted(_name_of(source, start) for source, start in (*features, *fixed))))
    places = {tuple(p for p in layout.parts if p.source.kind is not SourceKind.FEATURES) for layout in layouts}
    return len(places) == 1 and len(set(seen)) == len(seen)


def _name_of(source: Source, start: int) -> tuple[str, int]:
    return str(source.number if source.weight is None else source.weight), start


def _stack(step: Step) -> Layout:
    pieces: Sequence[Tensor] = step.argument(0, "tensors")
    made = step.made[0]
    dim = step.argument(1, "dim", 0) % made.dim()
    layouts = [step.layout(piece) for piece in pieces]
    whole = _merged(step, pieces, layouts, pieces[0].shape)
    features = len(pieces) > 1 and _are_heads(layouts)
    kind = SourceKind.FEATURES if features else SourceKind.PLACES
    key = ("stack", len(pieces), tuple(layouts))
    source = step.origins.same_source(key, lambda: Source(len(pieces), kind))
    return Layout((*whole.axes[:dim], axis_of(source), *whole.axes[dim:]), whole.fixed)


def _pad(step: Step) -> Layout:
    x, made = step.args[0], step.made[0]
    amounts = list(step.argument(1, "pad"))
    layout = step.layout(x)
    axes = list(layout.axes)
    for i in range(0, len(amounts), 2):
        at = x.dim() - 1 - i // 2
        if amounts[i] == 0 and amounts[i + 1] == 0:
            continue
        axis, size = axes[at], made.shape[at]
        if len(axis) == 1 and axis[0].source.kind is not SourceKind.UNSEEN:
            part = axis[0]
            axes[at] = (part._replace(size=size, start=part.start - amounts[i] * part.stride),)
        else:
            segments = [(amounts[i], axis)] if axis and amounts[i] >= 0 and amounts[i + 1] >= 0 else []
            axes[at] = step.derived(axis, size, "pad", amounts[i], segments=segments)
    return Layout(tuple(axes), layout.fixed)


def _turned(step: Step) -> Layout:
    """Entries of some axes in another order, all in the same: rolled, flipped."""
    x = step.args[0]
    is_flip = step.func in (torch.flip, Tensor.flip)
    given: Any = step.argument(2, "dims")
    if is_flip:
        given = step.args[1] if len(step.args) == 2 else step.args[1:] or step.kwargs["dims"]
    dims = [given] if isinstance(given, int) else list(given)
    by: Any = None if is_flip else step.argument(1, "shifts")
    shifts = [by] * len(dims) if by is None or isinstance(by, int) else list(by)
    layout = step.layout(x)
    axes = list(layout.axes)
    for dim, shift in zip(dims, shifts, strict=True):
        axes[dim] = step.derived(axes[dim], x.shape[dim], "flip" if is_flip else "roll", shift)
    return Layout(tuple(axes), layout.fixed)


def _unfold(step: Step) -> Layout:
    """Windows along an axis."""
    x, made = step.args[0], step.made[0]
    dim, size, stride = step.argument(1, "dimension"), step.argument(2, "size"), step.argument(3, "step")
    layout, at = step.layout(x), dim % x.dim()
    axis = layout.axes[at]
    if len(axis) == 1:
        part = axis[0]
        n = made.shape[at]
        windows: Axis = (part._replace(size=n, stride=part.stride * stride),) if n > 1 else ()
        inside: Axis = (part._replace(size=size, start=0 if windows else part.start),) if size > 1 else ()
    else:
        windows = step.derived(axis, made.shape[at], "windows", size, stride)
        inside = step.derived(axis, size, "in windows", size, stride)
    return Layout((*layout.axes[:at], windows, *layout.axes[at + 1 :], inside), layout.fixed)


def _pair(value: Any) -> Any:
    return (value, value) if isinstance(value, int) else value


def _unfold_images(step: Step) -> Layout:
    """Windows of images: (B, C, h, w) -> (B, C * kernel, windows)."""
    x = step.args[0]
    (kh, kw), (dh, dw) = _pair(step.argument(1, "kernel_size")), _pair(step.argument(2, "dilation", 1))
    (ph, pw), (sh, sw) = _pair(step.argument(3, "padding", 0)), _pair(step.argument(4, "stride", 1))
    batch, channels, *sides = step.layout(x).axes
    kernel: list[Part] = []
    windows: list[Part] = []
    for axis, n, k, d, p, s in zip(sides, x.shape[2:], (kh, kw), (dh, dw), (ph, pw), (sh, sw), strict=True):
        if len(axis) != 1:
            raise NotImplementedError
        part, n_windows = axis[0], (n + 2 * p - d * (k - 1) - 1) // s + 1
        outer = part._replace(size=n_windows, stride=part.stride * s, start=part.start - p * part.stride)
        windows += [outer] if n_windows > 1 else []
        kernel += [part._replace(size=k, stride=part.stride * d, start=0)] if k > 1 else []
    return Layout((batch, (*channels, *kernel), joined(windows)), step.layout(x).fixed)


def _written(step: Step) -> Layout:
    """Write into a tensor: what is written lies there from now on."""
    into, value = step.args[0], step.args[-1]
    layout = step.layout(into)
    if not isinstance(value, Tensor):
        return layout
    if step.func is Tensor.__setitem__:
        target = _indexed(step, into, step.args[1])
    elif step.func is Tensor.index_copy_:
        dim, index = step.args[1] % into.dim(), step.args[2].tolist()
        if index != list(range(index[0], index[0] + len(index))):
            return layout
        target = _slice(layout, dim, index[0], index[0] + len(index))
    else:
        target = layout
    of_value = step.layout(value)
    for axis, written in zip(reversed(target.axes), reversed(of_value.axes), strict=False):
        if len(axis) == 1 and written and axis[0].stride == 1 and axis[0].source not in sources_of(written):
            axis[0].source.segments += ((axis[0].start, written),)
    for part in singles_of(target, None if target is layout else layout):  # one entry is written
        if single := singles_of(of_value, target):
            part.source.segments += ((part.start, single),)
    return layout


# Layers


def _weight_name(step: Step, weight: Tensor) -> Any:
    """Identify a weight, also where it is a part of a larger one."""
    base = weight if weight._base is None else weight._base
    return id(base), 0 if weight._base is None else weight.storage_offset()


def _features(step: Step, size: int, made_of: Axis, weight: Tensor) -> Axis:
    given = tuple([(_made_by(part.source), part.start) for part in made_of if part.size < part.source.size])
    return axis_of(Source(size, SourceKind.FEATURES, sources_of(made_of), (*_weight_name(step, weight), given)))


def _made_by(source: Source) -> Any:
    return source.number if source.weight is None else source.weight


def _linear(step: Step) -> Layout:
    x, weight = step.argument(0, "input"), step.argument(1, "weight")
    layout = step.layout(x)
    features = _features(step, weight.shape[0] if weight.dim() > 1 else 1, layout.axes[-1], weight)
    axes = (*layout.axes[:-1], features) if weight.dim() > 1 else layout.axes[:-1]
    return Layout(axes, layout.fixed)


def _embedding(step: Step) -> Layout:
    ids, weight = step.argument(0, "input"), step.argument(1, "weight")
    layout = step.layout(ids)
    return Layout((*layout.axes, _features(step, weight.shape[-1], (), weight)), layout.fixed)


def _places_of(step: Step, x: Tensor, made: Tensor, first: int) -> list[Axis]:
    """Axes of places after a convolution or pooling: the same where their number is."""
    layout = step.layout(x)
    return [
        layout.axes[at] if x.shape[at] == made.shape[at] else step.derived(layout.axes[at], made.shape[at], step.func)
        for at in range(first, made.dim())
    ]


def _convolution(step: Step) -> Layout:
    x, weight, made = step.argument(0, "input"), step.argument(1, "weight"), step.made[0]
    layout = step.layout(x)
    at = made.dim() - (weight.dim() - 1)  # axis of the channels
    if x.shape[at] == made.shape[at] and weight.shape[1] == 1 and made.shape[at] > 1:  # each channel for itself
        channels = layout.axes[at]
    else:
        channels = _features(step, made.shape[at], layout.axes[at], weight)
    return Layout((*layout.axes[:at], channels, *_places_of(step, x, made, at + 1)), layout.fixed)


def _pooling(step: Step) -> Sequence[Layout]:
    x = step.args[0] if step.args else step.kwargs["input"]
    layout = step.layout(x)
    return [Layout(tuple(_places_of(step, x, made, 0)), layout.fixed) for made in step.made]


def _multihead(step: Step) -> Sequence[Layout]:
    """Output (Q, B, E) of multi_head_attention_forward, and weights."""
    layout = step.layout(step.argument(0, "query"))
    out = Layout((*layout.axes[:-1], axis_of(Source(step.made[0].shape[-1], SourceKind.FEATURES))), layout.fixed)
    return [out, *(new_layout(made.shape, SourceKind.UNSEEN) for made in step.made[1:])]


def _attention(step: Step) -> Layout:
    q, v = step.argument(0, "query"), step.argument(2, "value")
    layout = step.layout(q)
    return Layout((*layout.axes[:-1], step.layout(v).axes[-1]), layout.fixed)


def _as_complex(step: Step) -> Layout:
    layout = step.layout(step.args[0])
    return Layout(layout.axes[:-1], layout.fixed)


def _as_real(step: Step) -> Layout:
    layout = step.layout(step.args[0])
    return Layout((*layout.axes, axis_of(Source(2, SourceKind.UNSEEN))), layout.fixed)


# Products


def letters_of_product(func: Any, args: Sequence[Any], kwargs: dict[str, Any], given: Sequence[Tensor]) -> Any:
    """Name the axes of a product.

    Returns:
        tensors, terms, output: what is multiplied, the names of its axes, those of the result; None where they cannot
            be told.
    """
    if func is torch.einsum:
        return _letters_of_einsum(args)
    a, b = given[-2:]
    if func is Tensor.__rmatmul__:
        a, b = b, a
    n = max(a.dim(), b.dim(), 2) - 2
    batch = "".join(chr(ord("A") + i) for i in range(n))
    ours = "k" if a.dim() == 1 else batch[n - (a.dim() - 2) :] + "ik"
    theirs = "k" if b.dim() == 1 else batch[n - (b.dim() - 2) :] + "kj"
    output = batch + ("i" if a.dim() > 1 else "") + ("j" if b.dim() > 1 else "")
    return [a, b], [ours, theirs], output


def _letters_of_einsum(args: Sequence[Any]) -> Any:
    if len(args) >= 4 and isinstance(args[0], Tensor):  # einsum(x, [0, 1], y, [1, 2], [0, 2])
        letters = ["".join("..." if i is Ellipsis else chr(ord("a") + i) for i in term) for term in args[1::2]]
        tensors, rest = list(args[0:-1:2]), list(args[len(args) - len(args) % 2 :])
        result = "".join("..." if i is Ellipsis else chr(ord("a") + i) for i in rest[0]) if rest else None
        args = (",".join(letters) + ("" if result is None else f"->{result}"), *tensors)
    if not args or not isinstance(args[0], str):
        return None
    tensors = list(args[1]) if len(args) == 2 and isinstance(args[1], list | tuple) else list(args[1:])
    inputs, arrow, output = args[0].replace(" ", "").partition("->")
    terms = inputs.split(",")
    if not arrow:
        every = "".join(terms).replace(".", "")
        output = ("..." if "..." in inputs else "") + "".join(sorted(x for x in set(every) if every.count(x) == 1))
    most = max(
        (x.dim() - len(t.replace("...", "")) for x, t in zip(tensors, terms, strict=True) if "..." in t), default=0
    )
    dots = "".join(chr(ord("0") + i) for i in range(most))
    named = []
    for x, term in zip(tensors, terms, strict=True):
        n = x.dim() - len(term.replace("...", ""))
        named.append(term.replace("...", dots[most - n :]))
    return tensors, named, output.replace("...", dots)


def _product(step: Step) -> Layout:
    found = letters_of_product(step.func, step.args, step.kwargs, step.given)
    if found is None:
        raise NotImplementedError
    tensors, terms, output = found
    return multiplied(step, tensors, terms, output)


def multiplied(step: Step, tensors: Sequence[Tensor], terms: Sequence[str], output: str) -> Layout:
    """Return what a product is made of, and note the product.

    Args:
        step: the function.
        tensors: what is multiplied.
        terms: names of their axes.
        output: names of the axes of the result.
    """
    factors = []
    for x, term in zip(tensors, terms, strict=True):
        origin = step.origins.of(x)
        weight = None if origin.is_data else _weight_name(step, x)
        factors.append(Factor(origin, step.layout(x), term, weight))
    sizes = dict(zip(output, step.made[0].shape, strict=True))
    layout, step.product = contract(factors, output, sizes)
    return layout


def _sum(step: Step) -> Sequence[Layout]:
    """A sum; that of what was multiplied entry by entry is a product."""
    x, made = step.args[0], step.made[0]
    factors = step.origins.of(x).factors
    if factors is None or len(step.given) > 1:
        return _by_stand_in(step)
    dims = step.argument(1, "dim")
    dims = [dims % x.dim()] if isinstance(dims, int) else [dim % x.dim() for dim in dims or range(x.dim())]
    letters = "".join(chr(ord("a") + i) for i in range(x.dim()))
    keeps = made.dim() == x.dim()
    output = "".join(letter for at, letter in enumerate(letters) if keeps or at not in dims)
    named = [Factor(origin, layout, letters[len(letters) - len(layout.axes) :], None) for origin, layout in factors]
    if keeps:  # an axis that is summed over and left with one entry
        output_of_sum = "".join(letter for at, letter in enumerate(letters) if at not in dims)
        sizes = {letter: x.shape[letters.index(letter)] for letter in output_of_sum}
        layout, step.product = contract(named, output_of_sum, sizes)
        axes = iter(layout.axes)
        return [Layout(tuple([() if at in dims else next(axes) for at in range(x.dim())]), layout.fixed)]
    layout, step.product = contract(named, output, dict(zip(output, made.shape, strict=True)))
    return [layout]


def _methods(*names: str) -> list[Any]:
    found = [getattr(owner, name, None) for name in names for owner in (Tensor, torch, F)]
    return [function for function in found if function is not None]


_REDUCING = (
    "mean", "amax", "amin", "max", "min", "argmax", "argmin", "norm", "std", "var", "logsumexp", "prod", "all", "any",
    "median", "nanmean", "nansum", "count_nonzero",
)  # fmt: skip

RULES: dict[Any, Rule] = {
    **dict.fromkeys(
        _methods(
            "view",
            "reshape",
            "flatten",
            "unflatten",
            "unsqueeze",
            "squeeze",
            "view_as",
            "reshape_as",
            "ravel",
            "_unsafe_view",
            "atleast_2d",
            "atleast_3d",
        ),
        _reshape,
    ),
    **dict.fromkeys(
        _methods(
            "transpose_",
            "swapaxes_",
            "swapdims_",
            "t_",
            "permute",
            "transpose",
            "movedim",
            "moveaxis",
            "swapaxes",
            "swapdims",
            "t",
            "adjoint",
            *_REDUCING,
        ),
        _by_stand_in,
    ),
    **dict.fromkeys((Tensor.to, Tensor.type_as), _first),
    **dict.fromkeys([getattr(Tensor, name).__get__ for name in ("T", "mT", "H", "mH")], _by_stand_in),
    **dict.fromkeys(_methods("sum"), _sum),
    Tensor.__getitem__: _getitem,
    **dict.fromkeys((Tensor.squeeze_, Tensor.unsqueeze_), _reshape_in_place),
    **dict.fromkeys(_methods("narrow"), _narrow),
    **dict.fromkeys(_methods("select"), _select_one),
    **dict.fromkeys(_methods("index_select"), _index_select),
    **dict.fromkeys(_methods("gather", "take_along_dim"), _gather),
    **dict.fromkeys(_methods("chunk", "split", "tensor_split", "split_with_sizes"), _pieces),
    **dict.fromkeys([*_methods("unbind"), Tensor.__iter__], _unbind),
    **dict.fromkeys(_methods("topk", "sort", "argsort"), _top),
    **dict.fromkeys(_methods("expand", "expand_as", "broadcast_to"), _expand),
    **dict.fromkeys(_methods("repeat", "tile"), _repeat),
    **dict.fromkeys(_methods("repeat_interleave"), _repeat_interleave),
    **dict.fromkeys(_methods("cat", "concat", "concatenate"), _cat),
    **dict.fromkeys(_methods("stack"), _stack),
    F.pad: _pad,
    **dict.fromkeys((Tensor.__setitem__, Tensor.copy_, Tensor.index_copy_), _written),
    **dict.fromkeys(_methods("roll", "flip"), _turned),
    Tensor.unfold: _unfold,
    F.unfold: _unfold_images,
    F.linear: _linear,
    F.embedding: _embedding,
    **dict.fromkeys(_methods("conv1d", "conv2d", "conv3d"), _convolution),
    **dict.fromkeys(
        _methods(
            "avg_pool1d",
            "avg_pool2d",
            "avg_pool3d",
            "max_pool1d",
            "max_pool2d",
            "max_pool3d",
            "adaptive_avg_pool1d",
            "adaptive_avg_pool2d",
            "adaptive_avg_pool3d",
            "adaptive_max_pool1d",
            "adaptive_max_pool2d",
            "interpolate",
        ),
        _pooling,
    ),
    **dict.fromkeys((torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu), _recurrent),
    **dict.fromkeys((torch.lstm_cell, torch.gru_cell, torch.rnn_tanh_cell, torch.rnn_relu_cell), _cell),
    F.multi_head_attention_forward: _multihead,
    F.scaled_dot_product_attention: _attention,
    torch.view_as_complex: _as_complex,
    torch.view_as_real: _as_real,
    **dict.fromkeys(_methods("matmul", "__matmul__", "__rmatmul__", "bmm", "mm", "baddbmm", "addmm", "mv"), _product),
    torch.einsum: _product,
}
