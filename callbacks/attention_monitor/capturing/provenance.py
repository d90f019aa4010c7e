"""Where the tensors of a running forward come from, as far as it takes to tell attention from other products.

Every torch function that a model calls leaves an ``Origin`` for its results. From the origins follows whether queries
and keys come from the same sequence, and whether what goes into a softmax are scores.
"""

import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .axes import Layout, Source, SourceKind, axis_of, new_layout
from .axis_rules import RULES, Step, layouts_of
from .origin import Origin
from .running_modules import Frame
from .torch_functions import HARMLESS, KINDS, Kind


class Attachment(Protocol):
    """What a recogniser attaches to a tensor, to find it again on what is computed from the tensor."""

    def handed_on(self, tensor: Tensor, layout: Layout, changed: bool) -> "Attachment | None":
        """Return what a tensor gets that was computed from this one.

        Args:
            tensor: the tensor that was computed.
            layout: what its axes are made of.
            changed: whether the function may have changed numbers, that is, is not HARMLESS.
        """


@dataclass(slots=True)
class _TensorRecord:
    """What is remembered of a tensor while it lives. Its origin may outlive it, as a parent; its attachment may not."""

    tensor: Callable[[], Tensor | None]
    origin: Origin
    attachment: Any = None


_WEIGHT = _TensorRecord(lambda: None, Origin(0, is_data=False))

_NO_TENSORS = (bool, int, float, str, torch.Size, torch.dtype, torch.device, type(None))


class Origins:
    """The origins of all tensors seen; those of tensors that are gone are forgotten.

    Args:
        buffers: buffers of the model. They are weights like its parameters: masks, tables of positions, codebooks.
    """

    def __init__(self, buffers: Iterable[Tensor] = ()) -> None:
        self._buffers = {id(buffer) for buffer in buffers}
        self._serial = itertools.count(1)
        self._records: dict[int, _TensorRecord] = {}
        self._sources: dict[Any, Source] = {}  # of axes that were made of others, by how
        self._weights: dict[int, tuple[Callable[[], Tensor | None], Layout]] = {}
        self.first: Source | None = None

    def next_serial(self) -> int:
        """Draw a serial number: larger than those of all tensors so far, smaller than those of all later ones."""
        return next(self._serial)

    def of(self, tensor: Tensor) -> Origin:
        """Return the origin of a tensor; one that no function was seen to make is data, unless it is a weight."""
        return self._record_of(tensor).origin

    def is_data(self, tensor: Tensor) -> bool:
        """Whether a tensor depends on data, and not on weights alone."""
        return self._record_of(tensor).origin.is_data

    def layout_of(self, tensor: Tensor) -> Layout:
        """Return what the axes of a tensor are made of; each axis of one that comes from outside is a source."""
        record = self._record_of(tensor)
        if record is _WEIGHT:
            known = self._weights.get(id(tensor))
            if known is None or known[0]() is not tensor:
                known = self._weights[id(tensor)] = (weakref.ref(tensor), new_layout(tensor.shape))
            return known[1]
        origin = record.origin
        if origin.layout is None or len(origin.layout.axes) != tensor.dim():
            kind = SourceKind.PLACES if origin.is_data else SourceKind.COPIES
            if self.first is None and tensor.dim() > 1 and origin.is_data:
                self.first = Source(tensor.shape[0])
                rest = new_layout(tensor.shape[1:])
                fixed = ((self.first, 0),) if tensor.shape[0] == 1 else ()
                origin.layout = Layout((axis_of(self.first), *rest.axes), (*fixed, *rest.fixed))
            else:
                origin.layout = new_layout(tensor.shape, kind)
        return origin.layout

    def same_source(self, how: Any, make: Callable[[], Source]) -> Source:
        """Return the source that was made in a way, or make it now: what is done twice gives the same.

        Args:
            how: what it was made of and how.
            make: makes it.
        """
        source = self._sources.get(how)
        if source is None:
            source = self._sources[how] = make()
        return source

    def attachment(self, tensor: Tensor) -> Any:
        """Return what was attached to a tensor, or to one that it was computed from; None if nothing was."""
        return self._record_of(tensor).attachment

    def attach(self, tensor: Tensor, attachment: Attachment) -> None:
        """Attach something to a tensor."""
        self._record_of(tensor).attachment = attachment

    def forget_ancestry(self) -> None:
        """Forget how the tensors that are still there were made: another forward has no use for it."""
        for record in self._records.values():
            origin = record.origin
            origin.parents, origin.layout, origin.factors, record.attachment = (), None, None, None
        self._sources.clear()
        self.first = None

    def note_attention(self, result: Any) -> None:
        """Note that something is the result of attention: what depends on it is of another depth of the model."""
        for tensor in tensors_in((result,)):
            self._record_of(tensor).origin.mixed = self.next_serial()

    def record(
        self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], result: Any, inside: bool = True
    ) -> None:
        """Record what a torch function has made.

        Args:
            func: the function.
            args: arguments it was called with.
            kwargs: arguments it was called with, by name.
            result: what it returned.
            inside: whether the forward of a module is running.
        """
        made = _tensors_made(func, args, result)
        if not made:
            return
        given = list(tensors_in((*args, *kwargs.values()) if kwargs else args))
        if not given and not inside:
            return  # an input, such as noise; what a module makes from nothing are constants
        records = [self._record_of(tensor) for tensor in given]
        parents = tuple([record.origin for record in records])
        is_data = any(parent.is_data for parent in parents)
        is_projection, factors = False, None
        kind = KINDS.get(func)
        data = [x for x, parent in zip(given, parents, strict=True) if parent.is_data]
        if len(data) == 1 == len(made) and func not in RULES and data[0].shape == made[0].shape:
            layouts: Sequence[Layout] = (self.layout_of(data[0]),)  # nearly every function; nothing else is looked at
        else:
            layouts = layouts_of(Step(func, args, kwargs, given, made, self))
        if kind is not None:
            if kind is Kind.LAYER:
                is_data = is_projection = True  # learned tokens, once they are projected, are as good as data
            elif kind is Kind.PRODUCT and len(parents) >= 2:
                is_projection = not (parents[-2].is_data and parents[-1].is_data)
            elif len(parents) == 2 and parents[0].is_data and parents[1].is_data:
                factors = tuple([(record.origin, self.layout_of(x)) for record, x in zip(records, given, strict=True)])
        mixed = max([parent.mixed for parent in parents], default=0)
        attachment: Attachment | None = None
        for record in records:
            attachment = record.attachment if attachment is None else attachment
        for tensor, layout in zip(made, layouts, strict=True):
            origin = Origin(
                next(self._serial), parents, is_data, True, is_projection, tensor.shape, layout, factors, mixed
            )
            handed_on = None
            if attachment is not None:
                handed_on = attachment.handed_on(tensor, layout, func not in HARMLESS)
            self._set(tensor, origin, handed_on)
            if given and tensor is given[0] and tensor._base is not None:  # written to in place, through a view
                base = tensor._base
                of_base = Origin(
                    origin.serial, parents, is_data, True, is_projection, base.shape, self.layout_of(base), None, mixed
                )
                self._set(base, of_base)

    def _record_of(self, tensor: Tensor) -> _TensorRecord:
        record = self._records.get(id(tensor))
        if record is not None and record.tensor() is tensor:
            return record
        if isinstance(tensor, nn.Parameter) or id(tensor) in self._buffers:
            return _WEIGHT
        return self._set(tensor, Origin(0, is_known=False, shape=tensor.shape))

    def _set(self, tensor: Tensor, origin: Origin, attachment: Any = None) -> _TensorRecord:
        key, records = id(tensor), self._records
        record = _TensorRecord(weakref.ref(tensor, lambda _: records.pop(key, None)), origin, attachment)
        records[key] = record
        return record


def _tensors_made(func: Callable[..., Any], args: Sequence[Any], result: Any) -> Sequence[Tensor]:
    if func is Tensor.__setitem__:
        result = args[0]
    if isinstance(result, _NO_TENSORS):
        return ()
    return [result] if isinstance(result, Tensor) else list(tensors_in((result,)))


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the tensors among values, and in lists and tuples among them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from tensors_in(value)


def sources(origin: Origin, start: int) -> tuple[set[Origin], set[Origin]]:
    """Find what a tensor was computed from among what was there before ``start``.

    Returns:
        projected: origins from which a projection leads to the tensor.
        plain: origins from which a way without a projection leads to the tensor.
    """
    projected: set[Origin] = set()
    plain: set[Origin] = set()
    seen: set[tuple[Origin, bool]] = set()
    todo = [(origin, False)]
    while todo:
        current, through = todo.pop()
        if (current, through) in seen or not current.is_data:
            continue
        seen.add((current, through))
        if current.serial < start:
            (projected if through else plain).add(current)
        else:
            through = through or current.is_projection
            todo.extend((parent, through) for parent in current.parents)
    return projected, plain


def same_sequence(query: Origin, key: Origin, frames: Sequence[Frame], *, projects: bool = False) -> bool | None:
    """Tell whether queries and keys were projected from the same tensor; None where that was not seen.

    The innermost module that projects decides, by what it was handed in the module around it: further out,
    everything comes from the same input.

    Args:
        query: origin of the queries.
        key: origin of the keys.
        frames: modules that are running, outermost first.
        projects: whether the call itself projects what it is given.
    """
    for depth, frame in enumerate(reversed(frames)):
        (q, q_plain), (k, k_plain) = sources(query, frame.start), sources(key, frame.start)
        if projects:
            q, k, q_plain, k_plain = q | q_plain, k | k_plain, set(), set()
        if q & k or q & k_plain or q_plain & k:  # not both plain: rotary angles are applied to both
            return True
        if q or k:
            # one of them came from elsewhere: a cache, a function that was not seen
            lost = [plain for one, plain in ((q, q_plain), (k, k_plain)) if not one]
            if any(not origin.is_known for plain in lost for origin in plain):
                return None
            # they may have been normed, or given positions, each for itself, just before they were handed in
            outside = frames[: len(frames) - depth - 1][-1:]
            return any(_unprojected(q, frame.start) & _unprojected(k, frame.start) for frame in outside)
    return None


def _unprojected(origins: set[Origin], start: int) -> set[Origin]:
    """Find what tensors were computed from, without a projection, among what was there before ``start``."""
    return {plain for origin in origins for plain in sources(origin, start)[1]}
