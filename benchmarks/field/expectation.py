"""What is known of a model by reading its code."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn


@dataclass(frozen=True)
class Kind:
    """What is known of the attention in one class of module.

    Attributes:
        module: name of the class, in whose forward the softmax is, or in that of a module inside it.
        axes: axes of what goes into the softmax, as einops writes them: ``h`` heads, ``q`` queries, ``k`` keys, every
            other letter is one more batch-like axis. ``q`` and ``h`` are left out where there is no such axis. Where
            a module has several ways, they differ in their number of axes: ``b h q k | (b h) q k``.
        heads: number of heads, or the attribute of the module that says it.
        shows: what is right to show. ``tokens``: the pattern. ``channels``: the pattern, which has no positions, or a
            sentence. ``nothing``: no pattern but a sentence, as in linear attention. ``silence``: no pattern, and no
            sentence is needed.
        is_self: whether queries and keys are the same sequence; None: open to opinion.
        offset: position of the first query among the keys, for queries that are fewer than the keys; ``none``: they are
            not positions in a row, so that none may be told; None: not looked at.
        where: shell pattern of the paths of the modules that this is known of.
        after: what the module makes of the result of the softmax before it meets the values.
        weights: where what it makes of them is seen, when it is a module inside this one that makes it:
            ``attn_drop.input`` or ``mix.output``.
        loop: what the softmaxes of one forward are together, when they are written as a loop: ``h`` and ``q`` are an
            axis that each of them lacks, ``slices`` are parts of the first axis.
    """

    module: str
    axes: str = "b h q k"
    heads: int | str = "num_heads"
    shows: Literal["tokens", "channels", "nothing", "silence"] = "tokens"
    is_self: bool | None = True
    offset: int | Literal["none"] | None = None
    where: str = "*"
    after: Callable[[Any, Tensor], Tensor] | None = None
    weights: str = ""
    loop: Literal["", "h", "q", "slices"] = ""

    @property
    def has_pattern(self) -> bool:
        """Whether there is a pattern to be shown."""
        return self.shows in ("tokens", "channels")


@dataclass(frozen=True)
class FieldModel:
    """A model, what it is run on, and what is known of it.

    Attributes:
        package: package that it is from, by the name it is imported by.
        name: name of the model among those of its package.
        build: function that builds it.
        inputs: function that makes what it is called with: a tuple of arguments, or a dict of arguments by name.
        kinds: what is known of each class of module with attention.
        sites: number of attention calls of a forward that can be shown.
    """

    package: str
    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    kinds: Sequence[Kind]
    sites: int


def call(model: nn.Module, inputs: Any) -> Any:
    """Call a model with what ``inputs`` made."""
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)
