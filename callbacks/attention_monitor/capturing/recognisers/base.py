"""What a recogniser is: it reads the calls of some functions as attention."""

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...errors import AttentionMonitorError
from ..attention_call import AttentionCall
from ..provenance import Frame, Origins, same_sequence

ATTENTION_NAME = re.compile("attention|attn", re.IGNORECASE)  # classes of modules that look like attention


class NotUnderstoodError(AttentionMonitorError):
    """An attention call in a form that no recogniser reads; the message is the reason."""


@dataclass(frozen=True)
class Seen:
    """A call of a function that a recogniser asked for, after it has run.

    Attributes:
        func: the function.
        args: it was called with.
        kwargs: it was called with.
        result: what it returned.
        frames: modules whose forward is running, outermost first.
        origins: where tensors come from.
        fates: of the softmaxes of this forward.
    """

    func: Any
    args: Sequence[Any]
    kwargs: dict[str, Any]
    result: Any
    frames: Sequence[Frame]
    origins: Origins
    fates: "list[Fate]"

    def same_sequence(self, query: Tensor, key: Tensor) -> bool | None:
        """Whether these queries and keys come from the same sequence; None where that was not seen."""
        return same_sequence(self.origins.of(query), self.origins.of(key), self.frames)


class Recogniser(ABC):
    """Reads the calls of ``functions``. Subclasses register themselves.

    Attributes:
        functions: torch functions; operators by name: ``library::operator``, ``flex_attention``.
    """

    functions: ClassVar[Sequence[Any]]

    def __init_subclass__(cls) -> None:
        for function in cls.functions:
            RECOGNISERS[function] = cls()

    @abstractmethod
    def read(self, seen: Seen) -> AttentionCall | None:
        """The attention call that this call is or completes, without its site; None: it is not attention.

        Raises:
            NotUnderstoodError: when it is attention in a form that cannot be read.
        """


RECOGNISERS: dict[Any, Recogniser] = {}


_OPERATORS = (torch._ops.OpOverload, torch._ops.OpOverloadPacket, torch._ops.HigherOrderOperator)


def name_of(func: Any) -> Any:
    """A function as ``functions`` names it: itself, or the name of an operator."""
    if not isinstance(func, _OPERATORS):
        return func
    if isinstance(func, torch._ops.HigherOrderOperator):
        return func.name()
    return (func.overloadpacket if isinstance(func, torch._ops.OpOverload) else func)._qualified_op_name


def as_computed(x: Tensor) -> Tensor:
    """As autocast rounds it inside the call."""
    device = x.device.type
    return (
        x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) and x.dtype == torch.float32 else x
    )


def four_dimensional(x: Tensor) -> Tensor:
    """(Q, D) and (B, Q, D) get a head of their own; of more than four axes, all between batch and Q are heads."""
    if x.dim() == 4:
        return x
    if x.dim() < 4:
        return x.reshape((1,) * (3 - x.dim()) + x.shape).unsqueeze(1)
    return x.flatten(1, -3)


@dataclass(eq=False)
class Fate:
    """What becomes of a softmax; outlives its tensors.

    Attributes:
        path: of the attention module it was in; None: in none.
        met_values: its result has been multiplied with values.
    """

    path: str | None
    met_values: bool = False
