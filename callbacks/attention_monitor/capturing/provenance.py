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

from .running_modules import Frame
from .torch_functions import HARMLESS, KINDS, MAY_MIX_HEADS, Kind


@dataclass(slots=True, eq=False)
class Origin:
    """How a tensor came about.

    Attributes:
        serial: number that grows with time; 0 for a tensor that was there before anything was seen.
        parents: origins of the tensors it was computed from.
        is_data: whether it depends on more than one weight: on data, or on several weights in turn.
        is_known: whether it was made by a function that was seen, or is a weight.
        is_projection: whether it is a product with a weight.
        shape: shape of the tensor.
        product: origins of the two tensors that the tensor is a product of. It stays their product when a bias or a
            mask is added, when it is scaled, and when it is reshaped.
        factors: origins of the two tensors that were multiplied entry by entry; the sum of the entries is a product.
    """

    serial: int
    parents: tuple["Origin", ...] = ()
    is_data: bool = True
    is_known: bool = True
    is_projection: bool = False
    shape: Sequence[int] = ()
    product: "tuple[Origin, Origin] | None" = None
    factors: "tuple[Origin, Origin] | None" = None


class Attachment(Protocol):
    """What a recogniser attaches to a tensor, to find it again on what is computed from the tensor."""

    def handed_on(self, tensor: Tensor, changed: bool) -> "Attachment | None":
        """Return what a tensor gets that was computed from this one, other than by a product.

        Args:
            tensor: the tensor that was computed.
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

    def next_serial(self) -> int:
        """Draw a serial number: larger than those of all tensors so far, smaller than those of all later ones."""
        return next(self._serial)

    def of(self, tensor: Tensor) -> Origin:
        """Return the origin of a tensor; one that no function was seen to make is data, unless it is a weight."""
        return self._record_of(tensor).origin

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
            origin.parents, origin.product, origin.factors, record.attachment = (), None, None, None

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
        is_projection, product, factors = False, None, None
        kind = KINDS.get(func)
        inherits = True
        if kind is not None:
            is_data, is_projection, product, factors = _result_of(kind, parents, is_data)
            inherits = kind is Kind.TIMES or kind is Kind.SUM
            if is_projection and func in MAY_MIX_HEADS:
                inherits = _keeps_rows_and_keys(given, made[0])
        attachment: Attachment | None = None
        if inherits:
            for record in records:
                product = record.origin.product if product is None else product
                attachment = record.attachment if attachment is None else attachment
        for tensor in made:
            origin = Origin(next(self._serial), parents, is_data, True, is_projection, tensor.shape, product, factors)
            handed_on = None if attachment is None else attachment.handed_on(tensor, func not in HARMLESS)
            self._set(tensor, origin, handed_on)
            if given and tensor is given[0] and tensor._base is not None:  # written to in place, through a view
                self._set(tensor._base, origin)

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


_Pair = tuple[Origin, Origin]


def _result_of(kind: Kind, parents: tuple[Origin, ...], is_data: bool) -> tuple[bool, bool, _Pair | None, _Pair | None]:
    """Return ``is_data``, ``is_projection``, ``product`` and ``factors`` of what a function of a kind makes."""
    if kind is Kind.LAYER:
        # learned tokens, once they are projected, are as good as data
        return True, True, None, None
    if kind is Kind.PRODUCT and len(parents) >= 2:
        a, b = parents[-2:]
        return is_data, not (a.is_data and b.is_data), (a, b) if b.is_data else None, None
    if kind is Kind.TIMES and len(parents) == 2 and parents[0].is_data and parents[1].is_data:
        return is_data, False, None, (parents[0], parents[1])
    return is_data, False, parents[0].factors if kind is Kind.SUM else None, None


def _keeps_rows_and_keys(given: Sequence[Tensor], made: Tensor) -> bool:
    return any(x.dim() == made.dim() >= 3 and x.shape[-2:] == made.shape[-2:] for x in given)


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
