"""A model that reads text, and what it does with repeated random tokens."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from attention_monitor import (
    AttentionMaps,
    BatchProbe,
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


@dataclass(frozen=True)
class Subject:
    """A model to look into.

    Attributes:
        name: for people.
        model: that is called with token ids.
        tokenizer: its own.
        context: tokens that it can read; None: no limit is known.
        start: of an encoder-decoder, the token that its decoder begins with; None: it is none.
        vocab_size: tokens that it knows; None: that is not known.
        step: of training, where known.
        is_trained: its weights are not random.
    """

    name: str
    model: nn.Module
    tokenizer: Any
    context: int | None
    start: int | None = None
    vocab_size: int | None = None
    step: int | None = None
    is_trained: bool = True

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
            return attention_maps(self.model, TextProbe(ids, self.tokenizer))
        room = None if self.context is None else self.context - 1
        given = (text, "text as target") if target is None else (target, "target")
        of_decoder = [self.start, *self._ids(*given, room, say)]
        maps = attention_maps(self.model, BatchProbe(_for_both(torch.tensor([ids]), torch.tensor([of_decoder]))))
        labels = [token_labels(self.tokenizer, tokens) for tokens in (ids, of_decoder)]
        return replace(maps, tokens=labels[0], target_tokens=labels[1])

    def repeats(self) -> Snapshot | None:
        """What its heads do with repeated random tokens; None where its context is too short for that."""
        n_tokens = 25 if self.context is None else min(25, (self.context - 1) // 4)
        if n_tokens < 2:
            return None
        probe = RepeatedTokensProbe(n_tokens=n_tokens)
        return run_probe(self.model, probe if self.start is None else _ReadByBoth(probe), self.tokenizer)

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


def _for_both(ids: torch.Tensor, of_decoder: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": ids, "decoder_input_ids": of_decoder}
