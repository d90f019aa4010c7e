"""A model that reads text, and what it does with repeated random tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from attention_monitor import (
    AttentionMaps,
    BatchProbe,
    NoAttentionError,
    Probe,
    RepeatedTokensProbe,
    Snapshot,
    TextProbe,
    attention_maps,
    run_probe,
)
from attention_monitor.probes.base import EncodedProbe
from attention_monitor.probes.tokens import token_ids, token_labels
from gpt import InputError

from .errors import first_line


@dataclass(frozen=True)
class Subject:
    """A model to look into.

    Attributes:
        name: for people.
        model: that is called with token ids.
        tokenizer: its own.
        context: tokens that it can read; None: no limit is known.
        start: of an encoder-decoder, the token that its decoder begins with; None: it is none.
        target_context: of an encoder-decoder, tokens that its decoder can read; None: no limit is known.
        vocab_size: tokens that it knows; None: that is not known.
        step: of training, where known.
        is_trained: its weights are not random.
        notes: sentences for the user.
    """

    name: str
    model: nn.Module
    tokenizer: Any
    context: int | None
    start: int | None = None
    target_context: int | None = None
    vocab_size: int | None = None
    step: int | None = None
    is_trained: bool = True
    notes: Sequence[str] = ()

    def read(self, text: str, target: str | None = None, say: Callable[[str], None] = lambda _: None) -> AttentionMaps:
        """What it attends to.

        Args:
            text: that it reads; of one that is longer than its context, the last part.
            target: of an encoder-decoder, what its decoder reads; None: the text too.
            say: told when not all of a text is read.

        Raises:
            InputError: on an empty text, and a target for a model that has no use for it.
            AttentionMonitorError: when the model does not take the text.
        """
        if target is not None and self.start is None:
            raise InputError("A target is for an encoder-decoder, and this model is none; leave --target out.")
        ids = self._ids(text, "text", self.context, say)
        if self.start is None:
            return self._maps(TextProbe(ids, self.tokenizer))
        room = None if self.target_context is None else self.target_context - 1
        given = (text, "text as target") if target is None else (target, "target")
        of_decoder = [self.start, *self._ids(*given, room, say)]
        maps = self._maps(BatchProbe(_for_both(torch.tensor([ids]), torch.tensor([of_decoder]))))
        labels = [token_labels(self.tokenizer, tokens) for tokens in (ids, of_decoder)]
        return replace(maps, tokens=labels[0], target_tokens=labels[1])

    def repeats(self) -> Snapshot | None:
        """What its heads do with repeated random tokens; None where its context is too short for that."""
        contexts = [n for n in (self.context, self.target_context) if n is not None]
        n_tokens = min([25, *((n - 1) // 4 for n in contexts)])
        if n_tokens < 2:
            return None
        probe = RepeatedTokensProbe(n_tokens=n_tokens)
        return run_probe(self.model, probe if self.start is None else _ReadByBoth(probe), self.tokenizer)

    def _maps(self, probe: Probe) -> AttentionMaps:
        try:
            return attention_maps(self.model, probe)
        except NoAttentionError as error:  # of which the rest is for those who write a model
            reason = str(error).partition(". What is understood")[0]
            raise InputError(
                f"{reason}; what can be looked at is attention by softmax, and in Python a Recogniser, as "
                "docs/guide.md tells, adds to how it is found."
            ) from error

    def _ids(self, text: str, what: str, room: int | None, say: Callable[[str], None]) -> list[int]:
        if not text:
            raise InputError(f"The {what} is empty; give one to read.")
        ids = token_ids(self.tokenizer, text)
        if room is not None and len(ids) > room:
            say(f"The {what} has {len(ids)} tokens, and there is room for {room}: the last {room} are looked at.")
            if hasattr(self.tokenizer, "truncation_side"):
                self.tokenizer.truncation_side = "left"
                ids = list(self.tokenizer.encode(text, truncation=True, max_length=room))  # with its special tokens
            else:
                ids = ids[-room:]
            if not 0 < len(ids) <= room:
                raise InputError(
                    f"The model has room for {room} tokens of the {what}, and that is too few to read any."
                )
        if self.vocab_size is not None and max(ids) >= self.vocab_size:
            raise InputError(
                f"The tokenizer makes token {max(ids)} of the {what}, and the model knows {self.vocab_size} tokens: it "
                "is not the tokenizer of this model."
            )
        return ids


@dataclass(frozen=True)
class _ReadByBoth(Probe):
    """A probe of token ids that encoder and decoder read."""

    probe: Probe
    name: str = "repeated"
    every: int = 1

    def encode(self, tokenizer: Any = None) -> EncodedProbe:
        encoded = self.probe.encode(tokenizer)
        batches = [replace(batch, inputs=_for_both(batch.inputs, batch.inputs)) for batch in encoded.batches]
        return replace(encoded, batches=batches)


def on_device(model: nn.Module, device: str) -> nn.Module:
    """Move a model to a device.

    Raises:
        InputError: when it cannot be used.
    """
    try:
        return model.to(torch.device(device))
    except (RuntimeError, AssertionError) as error:  # what torch raises where it was built without CUDA
        raise InputError(f"The device {device!r} cannot be used here: {first_line(error)}") from error


def _for_both(ids: torch.Tensor, of_decoder: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": ids, "decoder_input_ids": of_decoder}
