"""What a recogniser is: it reads the calls of some functions as attention."""

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...errors import AttentionMonitorError
from ..attention_call import AttentionCall
from ..axes import Axis, Layout, SourceKind, singles_of, untagged
from ..loops import Clue
from ..provenance import Origin, Origins, same_sequence
from ..roles import places, said_heads, same_sequences, shares_windows
from ..running_modules import Frame


@dataclass
class FunctionCall:
    """A call of a function that a recogniser asked for, after it has run.

    Attributes:
        func: the function.
        args: arguments it was called with.
        kwargs: arguments it was called with, by name.
        result: what it returned.
        frames: modules whose forward is running, outermost first.
        origins: where tensors come from.
        clue: what tells whether the attention call is one of several in a loop; None: nothing is known.
    """

    func: Any
    args: Sequence[Any]
    kwargs: dict[str, Any]
    result: Any
    frames: Sequence[Frame]
    origins: Origins
    clue: Clue | None = None

    def same_sequence(self, query: Tensor, key: Tensor, *, projects: bool = False) -> bool | None:
        """Tell whether queries and keys come from the same sequence; None where that was not seen.

        Args:
            query: queries that the function was given, or made them from.
            key: keys that the function was given, or made them from.
            projects: whether the function itself projects them.
        """
        return same_sequence(self.origins.of(query), self.origins.of(key), self.frames, projects=projects)

    @property
    def said_heads(self) -> int | None:
        """Number of heads that the module which is running, or the one around it, says it has."""
        return said_heads(frame.module for frame in reversed(self.frames[-3:]))

    def relation(
        self,
        query: tuple[Origin, Layout, Axis],
        key: tuple[Origin, Layout, Axis],
        *,
        own_keys: bool = False,
        projects: bool = False,
        weight: Tensor | None = None,
        contracted: Axis = (),
        shared: Sequence[tuple[Axis, Axis]] = (),
    ) -> dict[str, Any]:
        """Tell whether queries and keys are the same tokens, and where the queries are among the keys.

        Args:
            query: where the queries come from, what their axes are made of, their axis of queries.
            key: the same of the keys.
            own_keys: whether every query has keys of its own.
            projects: whether the function itself projects them.
            weight: weight that it projects the queries with.
            contracted: axis of the queries that is summed over.
            shared: axes of queries and keys that are multiplied entry by entry.

        Returns:
            Arguments of AttentionCall.
        """
        (q_origin, q_layout, rows), (k_origin, k_layout, keys) = query, key
        q_layout, k_layout, rows, keys = q_layout.untagged(), k_layout.untagged(), untagged(rows), untagged(keys)
        if not keys:  # there is but one
            keys = tuple(part for part in singles_of(k_layout) if part.source.kind is not SourceKind.FEATURES)
        self.clue = Clue.of(q_layout, rows, keys, (q_origin.mixed, k_origin.mixed), weight, untagged(contracted))
        found = places(q_layout, rows, k_layout, keys, own_keys=own_keys)
        told: dict[str, Any] = {"self_attention": None}
        if found.same_tokens and (
            q_origin.mixed != k_origin.mixed or not same_sequences(q_layout, rows, k_layout, keys, shared)
        ):
            told = {"self_attention": False}  # of another depth: what an encoder made of the tokens; other sequences
        elif found.are_apart:
            told = {"self_attention": False}
        elif found.are_alike and shares_windows(q_layout, k_layout, rows, keys):
            told = {"self_attention": True}
        elif found.same_tokens:
            positions = found.positions if own_keys or shares_windows(q_layout, k_layout, rows, keys) else None
            told = {"self_attention": True, "query_positions": positions, "positions_known": positions is not None}
        else:
            told["self_attention"] = same_sequence(q_origin, k_origin, self.frames, projects=projects)
            if found.same_tokens is False and told["self_attention"]:
                told["self_attention"] = False
            if not found.is_seen and _size(rows) != _size(keys):
                told["positions_known"] = False  # of as many queries as keys, each is taken to be at its own
        if own_keys:
            told["over"] = "neighbours"
        return told


def _size(axis: Axis) -> int:
    return math.prod(part.size for part in axis)


class Recogniser(ABC):
    """Read the calls of some functions as attention.

    A subclass registers itself. Every capture makes one instance of it, which may remember things from call to call.

    Attributes:
        functions: torch functions to read; operators by name: ``library::operator``, ``flex_attention``.
        reads: what the recogniser reads, in words, for the error that lists what is understood; left out, the name of
            the class.

    Example:
        >>> from torch import nn
        >>> from attention_monitor import AttentionCall, capture
        >>> def my_attention(q, k, v):
        ...     if torch.overrides.has_torch_function((q, k, v)):  # a library's own functions do this
        ...         return torch.overrides.handle_torch_function(my_attention, (q, k, v), q, k, v)
        ...     return (q @ k.mT).softmax(-1) @ v
        >>> class MyAttention(Recogniser):
        ...     functions = (my_attention,)
        ...     reads = "my_attention"
        ...
        ...     def read(self, call):
        ...         q, k, v = call.args  # (B, H, T, D)
        ...         return AttentionCall("", q.detach(), k.detach(), self_attention=call.same_sequence(q, k))
        >>> class Model(nn.Module):
        ...     def forward(self, x):
        ...         return my_attention(x, x, x)
        >>> model = Model()
        >>> with capture(model) as calls:
        ...     z = model(torch.randn(1, 2, 3, 4))
        >>> calls[0].site, calls[0].pattern().shape
        ('Model', torch.Size([1, 2, 3, 3]))
        >>> del RECOGNISERS[my_attention]  # or it stays for the rest of the program
    """

    functions: ClassVar[Sequence[Any]]
    reads: ClassVar[str]

    def __init_subclass__(cls) -> None:
        if cls.read is Recogniser.read:  # a base for others
            return
        if "reads" not in vars(cls):
            cls.reads = cls.__name__
        functions = getattr(cls, "functions", None)
        if not isinstance(functions, tuple | list) or not functions:
            raise AttentionMonitorError(
                f"The recogniser {cls.__name__} needs functions, those whose calls it reads, such as (my_attention,); "
                f"got {functions!r}."
            )
        for function in functions:
            RECOGNISERS[function] = cls

    def around(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run a function for the model and return its result, to the bit what it would be without the recogniser."""
        return func(*args, **kwargs)

    @abstractmethod
    def read(self, call: FunctionCall) -> AttentionCall | None:
        """Return the attention call that this call is or completes, without its site; None if it is not attention.

        Raises:
            NotUnderstoodError: when it is attention in a form that cannot be read.
        """

    def at_end_of_forward(self, understood: Collection[str]) -> Iterator[tuple[str, str]]:
        """Yield what was not understood in the forward that has ended, and forget what is remembered of it.

        Args:
            understood: paths of the modules in which a call was read.

        Yields:
            path, reason: path of a module, and why what it does could not be read.
        """
        yield from ()


RECOGNISERS: dict[Any, type[Recogniser]] = {}


_OPERATORS = (torch._ops.OpOverload, torch._ops.OpOverloadPacket, torch._ops.HigherOrderOperator)


def name_of(func: Any) -> Any:
    """Name a function as ``functions`` does: by itself, or an operator by its name."""
    if not isinstance(func, _OPERATORS):
        return func
    if isinstance(func, torch._ops.HigherOrderOperator):
        return func.name()
    return (func.overloadpacket if isinstance(func, torch._ops.OpOverload) else func)._qualified_op_name


def as_computed(x: Tensor) -> Tensor:
    """Round a tensor as autocast rounds it inside the call."""
    device = x.device.type
    return (
        x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) and x.dtype == torch.float32 else x
    )
