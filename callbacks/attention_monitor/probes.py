"""Fixed inputs whose patterns can be compared over time, and what is scored on them."""

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .errors import AttentionMonitorError


@dataclass(frozen=True)
class TextProbe:
    """A text to look at during training.

    Attributes:
        text: what the model reads.
        tokenizer: anything with ``encode(text)`` and ``decode(ids)``: a tiktoken ``Encoding``, a Hugging Face
            tokenizer; None: the ``tokenizer`` attribute of the datamodule or the model.
        name: of its pictures, ``attention_maps/{name}``.
    """

    text: str
    tokenizer: Any = None
    name: str = "text"

    def encode(self, tokenizer: Any = None) -> "TokenProbe":
        """Token ids and a label for each, by the probe's own tokenizer or else by ``tokenizer``.

        Raises:
            AttentionMonitorError: without a tokenizer, or when the text has no tokens.
        """
        tokenizer = self.tokenizer or tokenizer
        if not hasattr(tokenizer, "encode") or not hasattr(tokenizer, "decode"):
            found = "no tokenizer was found" if tokenizer is None else f"{tokenizer!r} has no encode and decode"
            raise AttentionMonitorError(
                f"The probe {self.text!r} is a text but {found} to encode it: use TextProbe(text, tokenizer); or give "
                "the datamodule or the module a `tokenizer`, AttentionRecorder `tokenizer=`, Trainer "
                "`processing_class=`."
            )
        # tiktoken's plain `encode` refuses texts that contain special tokens
        encoded = getattr(tokenizer, "encode_ordinary", tokenizer.encode)(self.text)
        ids = [int(i) for i in getattr(encoded, "ids", encoded)]  # `tokenizers` wraps them
        if not ids:
            raise AttentionMonitorError(f"The probe {self.text!r} has no tokens; give a text to look at.")
        return TokenProbe(self.name, torch.tensor([ids]), [tokenizer.decode([i]) for i in ids])


@dataclass(frozen=True)
class TokenProbe:
    """Token ids (1, T), int64, that the model is called on, and a label for each position."""

    name: str
    tokens: Tensor
    labels: list[str]

    def run(self, model: nn.Module) -> None:
        """Call the model on the probe, leaving no trace in it.

        Raises:
            AttentionMonitorError: when the model does not take the probe.
        """
        parameter = next(model.parameters(), None)
        device = torch.device("cpu") if parameter is None else parameter.device
        with undisturbed(model):
            try:
                model(self.tokens.to(device))
            except Exception as error:
                raise AttentionMonitorError(
                    f"The probe {self.name!r} ({self.tokens.shape[1]} tokens) could not be run through "
                    f"{type(model).__name__}: {type(error).__name__}: {error}. A probe is run by model(token_ids); "
                    "leave it out where that makes no sense."
                ) from error


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards module modes, buffers and random states are as they were."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, None if buffer is None else (buffer._version, buffer.clone()))
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 - what a model may draw from
    try:
        with torch.random.fork_rng(sorted(device.index for device in devices)), torch.no_grad():
            model.eval()
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        for module, training in modes:
            module.training = training
        for module, name, buffer, saved in buffers:
            module._buffers[name] = buffer
            if buffer is not None and saved is not None and buffer._version != saved[0]:
                buffer.copy_(saved[1])


@dataclass(frozen=True)
class RelationScore:
    """How well heads follow one relation.

    Attributes:
        name: of the relation.
        n_pairs: how many (query, key) pairs were scored.
        accuracy: (layers, H) share of pairs whose largest weight, over earlier tokens, is on the key.
        baseline: share of pairs that the best fixed offset gets right (Clark et al. 2019).
        offset: that offset, query position - key position.
    """

    name: str
    n_pairs: int
    accuracy: Tensor
    baseline: float
    offset: int


def score_relations(examples: Iterable[tuple[Tensor, Sequence[tuple[int, int, str]]]]) -> list[RelationScore]:
    """Score every head on token pairs whose relation is known (Clark et al. 2019, Voita et al. 2019).

    Args:
        examples: for each text the patterns of all heads, (layers, H, T, T), and its pairs (query position, key
            position, relation name); the key comes before the query.

    Returns:
        One score per relation, in order of appearance.
    """
    hits: dict[str, Tensor] = {}
    offsets: defaultdict[str, Counter[int]] = defaultdict(Counter)
    for patterns, pairs in examples:
        for query, key, name in pairs:
            if not 0 <= key < query < patterns.shape[-1]:
                raise AttentionMonitorError(
                    f"Relation {name!r} has query={query}, key={key} in a text of {patterns.shape[-1]} tokens; "
                    f"the key must come before the query and both lie in the text."
                )
            hit = (patterns[:, :, query, :query].argmax(-1) == key).double()  # (layers, H)
            hits[name] = hit + hits.get(name, 0)
            offsets[name][query - key] += 1
    scores = []
    for name, counts in offsets.items():
        offset, most = counts.most_common(1)[0]
        scores.append(RelationScore(name, counts.total(), hits[name] / counts.total(), most / counts.total(), offset))
    return scores
