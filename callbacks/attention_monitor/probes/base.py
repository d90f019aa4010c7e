"""Fixed inputs whose patterns can be compared over time, and what is scored on them.

A probe is what the user writes. Encoded, it is batches to call the model on, and for each of them the scores, 0..1 for
every head, that follow from an attention call.
"""

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..capturing.attention_call import AttentionCall
from ..capturing.capture_mode import captures_paused
from ..errors import AttentionMonitorError
from ..snapshots import HeadScore

ScoreFunction = Callable[[AttentionCall], dict[str, Tensor]]
Watching = TypeVar("Watching")


@dataclass(frozen=True)
class ProbeBatch:
    """One call of the model.

    Attributes:
        inputs: a tensor, a tuple of arguments, or a dict of keyword arguments.
        score: function that scores a self-attention call on it: name -> (n, H), to be averaged over n and batches.

    Example:
        >>> batch = ProbeBatch(torch.tensor([[3, 1, 4]]), lambda call: {"weight": call.pattern().mean((2, 3))})
        >>> batch.run(nn.Embedding(5, 2), torch.device("cpu"))
    """

    inputs: Any
    score: ScoreFunction

    def run(self, model: nn.Module, device: torch.device) -> None:
        """Call a model on the inputs, moved to a device."""
        inputs = dict(self.inputs) if isinstance(self.inputs, Mapping) else self.inputs  # of transformers, a UserDict
        inputs = tree_map_only(Tensor, lambda x: x.to(device, copy=True), inputs)  # a model may write into them
        if isinstance(inputs, Mapping):
            model(**inputs)
        elif isinstance(inputs, list | tuple):
            model(*inputs)
        else:
            model(inputs)


@dataclass(frozen=True)
class EncodedProbe:
    """A probe that is ready to be run.

    Attributes:
        name: name of the source of its snapshots.
        batches: batches that the model is called on.
        scores: columns that its batches are scored by, in order.
        labels: labels of the positions of the first batch's first sequence, where they are known.
        is_drawn: whether its maps are worth a picture.
        with_statistics: whether the statistics that are taken of training are taken of it too.
        every: sampled steps from one run to the next.
        with_layers: whether layers are measured as a whole too.

    Example:
        >>> from attention_monitor import capture
        >>> model = nn.TransformerEncoderLayer(4, 2, batch_first=True)
        >>> probe = EncodedProbe("zeros", [ProbeBatch(torch.zeros(1, 3, 4), lambda call: {})])
        >>> [call.site for call in probe.run(model, capture(model))]
        ['self_attn']
    """

    name: str
    batches: Sequence[ProbeBatch]
    scores: Sequence[HeadScore] = ()
    labels: list[str] | None = None
    is_drawn: bool = False
    with_statistics: bool = False
    every: int = 1
    with_layers: bool = False

    def run(
        self,
        model: nn.Module,
        watching: AbstractContextManager[Watching],
        before: Callable[[ProbeBatch], None] | None = None,
    ) -> Watching:
        """Call a model on every batch inside a context, leaving no trace in it and in captures that are running.

        Args:
            model: model to call, in evaluation mode and without gradients.
            watching: context that watches the model, such as ``capture(model)``.
            before: called with each batch before the model is.

        Returns:
            What the context gives.

        Raises:
            AttentionMonitorError: when the model does not take the probe.
        """
        parameter = next(model.parameters(), None)
        device = torch.device("cpu") if parameter is None else parameter.device
        with captures_paused(), watching as seen, undisturbed(model):
            for batch in self.batches:
                if before is not None:
                    before(batch)
                try:
                    batch.run(model, device)
                except Exception as error:
                    raise AttentionMonitorError(self._does_not_fit(model, batch, error)) from error
        return seen

    def _does_not_fit(self, model: nn.Module, batch: ProbeBatch, error: Exception) -> str:
        shape = f" of shape {tuple(batch.inputs.shape)}" if isinstance(batch.inputs, Tensor) else ""
        reason = f"{type(error).__name__}: {error}".rstrip(".")
        return (
            f"The probe {self.name!r}{shape} could not be run through {type(model).__name__}: {reason}. Texts and "
            "tokens are run by model(token_ids), in evaluation mode: make them fit its context and vocabulary "
            "(vocab_size); for other inputs there is BatchProbe."
        )


class Probe(ABC):
    """A fixed input that is run through the model at sampled steps.

    Attributes:
        name: name that its tags begin with: letters, digits, underscores.
        every: sampled steps from one run to the next; the last step has one too.

    Example:
        >>> class Zeros(Probe):
        ...     name, every = "zeros", 1
        ...
        ...     def encode(self, tokenizer=None):
        ...         def score(call):  # of a self-attention call: name -> (n, H)
        ...             return {"to_itself": call.pattern().diagonal(dim1=-2, dim2=-1).mean(-1)}
        ...
        ...         tokens = torch.zeros(1, 8, dtype=torch.long)
        ...         return EncodedProbe("zeros", [ProbeBatch(tokens, score)], [HeadScore("to_itself")])
        >>> Zeros().encode().name
        'zeros'
    """

    name: str
    every: int

    @abstractmethod
    def encode(self, tokenizer: Any = None) -> EncodedProbe:
        """Make batches of the probe, so that it is ready to be run.

        Args:
            tokenizer: tokenizer of the datamodule or the model; a probe's own comes first.

        Raises:
            AttentionMonitorError: when it cannot be encoded.
        """


def is_of_tokens(call: AttentionCall, shape: tuple[int, ...]) -> bool:
    """Whether a call's positions are those of tokens (B, T): a model may pool them, or put others before."""
    B, T = shape
    return call.shape[0] == B and call.shape[2:] == (T, T)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode without gradients.

    Afterwards module modes, buffers and random states are as they were.
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, None if buffer is None or buffer.is_inference() else (buffer._version, buffer.clone()))
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 - what a model may draw from
    try:
        with torch.random.fork_rng(sorted(device.index for device in devices)), torch.no_grad():
            for module, _ in modes:
                module.training = False  # not by eval(): a model's own may move weights about, as LoRA's does
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        for module, training in modes:
            module.training = training
        for module, _ in modes:
            module._buffers.clear()  # of what was registered on the way too
        for module, name, buffer, saved in buffers:
            module._buffers[name] = buffer
            if buffer is not None and saved is not None and buffer._version != saved[0]:
                buffer.copy_(saved[1])
