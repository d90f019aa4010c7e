"""Where the tensors of a running forward come from, as far as it takes to tell attention from other products.

Every torch function that a model calls leaves an ``Origin`` for its results. From them follows whether queries and
keys come from the same sequence, and whether what goes into a softmax are scores.
"""

import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Products of two tensors, either of which may be a weight.
PRODUCTS = {
    torch.matmul,
    Tensor.matmul,
    Tensor.__matmul__,
    Tensor.__rmatmul__,
    torch.bmm,
    Tensor.bmm,
    torch.mm,
    Tensor.mm,
    torch.addmm,
    Tensor.addmm,
    torch.baddbmm,
    Tensor.baddbmm,
    torch.einsum,
}


# Products with weights.
_LAYERS = {F.linear, F.bilinear, F.embedding, F.conv1d, F.conv2d, F.conv3d}


# Nothing that comes out of these is a product of queries and keys any more.
_MIXERS = {
    F.layer_norm, F.rms_norm, F.group_norm, F.batch_norm, F.instance_norm, torch.lstm, torch.gru, torch.rnn_tanh,
    torch.rnn_relu, torch.lstm_cell, torch.gru_cell,
}  # fmt: skip


_TIMES = {torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__}


_SUM = {torch.sum, Tensor.sum}


# Leave what a tensor carries as it is.
HARMLESS = {
    F.dropout, torch.dropout, F.alpha_dropout, F.feature_alpha_dropout, Tensor.to, Tensor.float, Tensor.half,
    Tensor.bfloat16, Tensor.double, Tensor.type, Tensor.type_as, Tensor.contiguous, Tensor.clone, torch.clone,
    Tensor.detach, Tensor.view, Tensor.reshape, torch.reshape, Tensor.permute, torch.permute, Tensor.transpose,
    torch.transpose, Tensor.flatten, torch.flatten, Tensor.unflatten, Tensor.unsqueeze, torch.unsqueeze,
    Tensor.squeeze, torch.squeeze, Tensor.__getitem__, Tensor.expand, Tensor.movedim, torch.movedim, Tensor.swapaxes,
    Tensor.narrow, torch.narrow, Tensor.view_as, Tensor.expand_as, Tensor.t, torch.t,
    *(getattr(Tensor, name).__get__ for name in ("T", "mT")),
}  # fmt: skip


@dataclass(slots=True, eq=False)
class Origin:
    """How a tensor came about.

    Attributes:
        serial: grows with time; 0 for what was there before anything was seen.
        parents: of the tensors it was computed from.
        is_data: depends on more than a weight: on data, or on several weights in turn.
        is_known: made by a function that was seen, or a weight.
        is_projection: product with a weight.
        shape: of the tensor.
        product: origins of the two tensors whose product it still is, but for bias, mask, scale and shape.
        factors: origins of the two tensors that were multiplied entry by entry; their sum is a product.
    """

    serial: int
    parents: tuple["Origin", ...] = ()
    is_data: bool = True
    is_known: bool = True
    is_projection: bool = False
    shape: Sequence[int] = ()
    product: "tuple[Origin, Origin] | None" = None
    factors: "tuple[Origin, Origin] | None" = None


@dataclass
class Frame:
    """A module whose forward is running.

    Attributes:
        name: path of the module.
        module: the module.
        start: serial number of the first tensor made in it.
    """

    name: str
    module: nn.Module
    start: int


class Carried(Protocol):
    """What a recogniser attaches to a tensor."""

    def handed_on(self, tensor: Tensor, changed: bool) -> "Carried | None":
        """What a tensor carries that was computed from this one, but not by a product; changed: not HARMLESS."""


@dataclass(slots=True)
class _Entry:
    tensor: Callable[[], Tensor | None]
    origin: Origin
    carried: Any = None  # not in the origin, which outlives the tensor


_WEIGHT = _Entry(lambda: None, Origin(0, is_data=False))


_NO_TENSORS = (bool, int, float, str, torch.Size, torch.dtype, torch.device, type(None))


class Origins:
    """The origins of all tensors seen; forgets those that are gone.

    Args:
        buffers: of the model, which are weights like its parameters: masks, tables of positions, codebooks.
    """

    def __init__(self, buffers: Iterable[Tensor] = ()) -> None:
        self._buffers = {id(buffer) for buffer in buffers}
        self._serial = itertools.count(1)
        self._entries: dict[int, _Entry] = {}

    def now(self) -> int:
        """A serial number: larger than those of all tensors so far, smaller than those to come."""
        return next(self._serial)

    def of(self, tensor: Tensor) -> Origin:
        """The tensor's origin; what was not seen being made is data, unless it is a parameter."""
        return self._entry(tensor).origin

    def carried(self, tensor: Tensor) -> Any:
        """What was attached to the tensor, or to one that it was computed from; None: nothing."""
        return self._entry(tensor).carried

    def attach(self, tensor: Tensor, carried: Carried) -> None:
        """Let the tensor carry something."""
        self._entry(tensor).carried = carried

    def cut(self) -> None:
        """Forget how the tensors that are still there were made: that is of no more use in another forward."""
        for entry in self._entries.values():
            origin = entry.origin
            origin.parents, origin.product, origin.factors, entry.carried = (), None, None, None

    def follow(
        self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], result: Any, inside: bool = True
    ) -> None:
        """Take note of what a torch function has made; inside: the forward of a module."""
        if func is Tensor.__setitem__:
            result = args[0]
        if isinstance(result, _NO_TENSORS):
            return
        made = [result] if isinstance(result, Tensor) else list(tensors_in((result,)))
        if not made:
            return
        given = list(tensors_in((*args, *kwargs.values()) if kwargs else args))
        if not given and not inside:
            return  # an input, such as noise; a module's own are constants
        entries = [self._entry(tensor) for tensor in given]
        parents = tuple(entry.origin for entry in entries)
        is_data = any(parent.is_data for parent in parents)
        is_projection, product, factors, carried = False, None, None, None
        if func in _LAYERS:
            # learned tokens, once they are projected, are as good as data
            is_projection = is_data = True
        elif func in PRODUCTS and len(parents) >= 2:
            a, b = parents[-2:]
            is_projection = not (a.is_data and b.is_data)
            product = (a, b) if b.is_data else None
        elif func in _TIMES and len(parents) == 2 and all(parent.is_data for parent in parents):
            factors = parents
        elif func in _SUM:
            product = parents[0].factors
        mixes_heads = func in (torch.einsum, F.conv2d) and is_projection and _keeps_rows_and_keys(given, made[0])
        if not (func in _LAYERS or func in PRODUCTS or func in _MIXERS) or mixes_heads:
            for entry in entries:
                product = entry.origin.product if product is None else product
                carried = entry.carried if carried is None else carried
        for tensor in made:
            origin = Origin(next(self._serial), parents, is_data, True, is_projection, tensor.shape, product, factors)
            self._set(tensor, origin, None if carried is None else carried.handed_on(tensor, func not in HARMLESS))
            if given and tensor is given[0] and tensor._base is not None:  # written to in place, through a view
                self._set(tensor._base, origin)

    def _entry(self, tensor: Tensor) -> "_Entry":
        entry = self._entries.get(id(tensor))
        if entry is not None and entry.tensor() is tensor:
            return entry
        if isinstance(tensor, nn.Parameter) or id(tensor) in self._buffers:
            return _WEIGHT
        return self._set(tensor, Origin(0, is_known=False, shape=tensor.shape))

    def _set(self, tensor: Tensor, origin: Origin, carried: Any = None) -> _Entry:
        key, entries = id(tensor), self._entries
        entry = entries[key] = _Entry(weakref.ref(tensor, lambda _: entries.pop(key, None)), origin, carried)
        return entry


def _keeps_rows_and_keys(given: Sequence[Tensor], made: Tensor) -> bool:
    return any(x.dim() == made.dim() >= 3 and x.shape[-2:] == made.shape[-2:] for x in given)


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among values, and in lists and tuples among them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from tensors_in(value)


def sources(origin: Origin, start: int) -> tuple[set[Origin], set[Origin]]:
    """What a tensor was computed from that was there before ``start``: through a projection, and without one."""
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
    """Whether queries and keys were projected from the same tensor; None where that was not seen.

    Decided in the innermost module that projects, and by what it was handed in the module around it: further out,
    everything comes from the same input.

    Args:
        query: origin of the queries.
        key: of the keys.
        frames: modules that are running, outermost first.
        projects: the call itself projects what it is given.
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
    """What tensors were computed from that was there before ``start``, without a projection."""
    return {plain for origin in origins for plain in sources(origin, start)[1]}
