"""How many tokens a model has positions for: it reads a few, and is watched taking rows of its tables.

What a config says is not enough: of RoBERTa's 514 positions two are never a token's, OPT has two that its config does
not count, and LED's config has other names for them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

N_TEXT, N_TARGET = 4, 3  # tokens that are read; their numbers tell the tables of an encoder and a decoder apart


@dataclass(frozen=True)
class Rooms:
    """Tokens that there are positions for; None: no table of positions has been seen.

    Attributes:
        text: of what the model reads.
        target: of what the decoder of an encoder-decoder reads, with the token that it begins with.
    """

    text: int | None
    target: int | None


def rooms_of(model: nn.Module, token: int, start: int | None) -> Rooms:
    """Have a model read one token, repeated, so that rows that follow one another are rows of positions.

    Args:
        model: in evaluation mode.
        token: an ordinary one, as special ones may have no position.
        start: of an encoder-decoder, the token that its decoder begins with; None: it is none.

    Raises:
        Exception: whatever a model raises that does not read token ids alone.
    """
    text = torch.full((1, N_TEXT), token)
    target = None if start is None else torch.tensor([[start, *[token] * (N_TARGET - 1)]])
    with torch.no_grad(), _as_it_was(model), _PositionTables() as tables:
        _call(model, text, target)
    of_target = [room for n, room in tables.rooms if start is not None and n == N_TARGET]
    of_text = [room for n, room in tables.rooms if n == N_TEXT]
    of_text += [room - room % n for n, room in tables.rooms if n > N_TEXT]  # padded to a multiple of n, as LED does
    return Rooms(min(of_text, default=None), min(of_target, default=None))


def _call(model: nn.Module, text: Tensor, target: Tensor | None) -> Any:
    """Have a model read token ids, (1, T), on its device."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    if target is None:
        return model(text.to(device))
    return model(input_ids=text.to(device), decoder_input_ids=target.to(device))


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Put back what a model changes of itself: after a short text BigBird attends to all of it, for good."""
    before = [(module, dict(vars(module))) for module in model.modules()]
    inside: list[tuple[Any, Any]] = [
        (held, dict(held)) for module, _ in before for held in (module._modules, module._buffers)
    ]
    try:
        yield
    finally:
        for module, state in before:
            module.__dict__.clear()
            module.__dict__.update(state)
        for held, items in inside:
            held.clear()
            held.update(items)


class _PositionTables(TorchFunctionMode):
    """Sees which rows of tables are looked up.

    Attributes:
        rooms: of each look-up that begins with rows that follow one another, how many do, and how many the table has
            from the first of them on.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rooms: list[tuple[int, int]] = []

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.embedding:
            self._look(**dict(zip(("input", "weight"), args, strict=False)) | kwargs)
        return function(*args, **kwargs)

    def _look(self, input: Tensor, weight: Tensor, **_: Any) -> None:
        rows = input.reshape(-1).tolist()
        n = next((i for i in range(1, len(rows)) if rows[i] != rows[0] + i), len(rows))
        # all rows of a table are tokens of the model's own, which every text gets
        if len(rows) == input.shape[-1] and n < len(weight):
            self.rooms.append((n, len(weight) - rows[0]))
