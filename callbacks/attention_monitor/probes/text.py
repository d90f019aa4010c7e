"""A text to look at."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..errors import AttentionMonitorError
from ..statistics.maps import MAX_MAP_SIZE
from .base import EncodedProbe, Probe, ProbeBatch
from .layer_measures import HEAD_DISTANCE
from .position import POSITION_SCORES, position_scores
from .tokens import checked_tokenizer, token_ids, token_labels


@dataclass(frozen=True)
class TextProbe(Probe):
    """A text to look at: its maps are drawn with its tokens, and heads are scored by position.

    Scores: ``sink``, mean weight on the first token (Gu et al. 2024); ``positional``, largest share of rows whose
    largest weight is at one offset (Voita et al. 2019).

    Attributes:
        text: text that the model reads, or its token ids.
        tokenizer: anything with ``encode(text)`` and ``decode(ids)``: a tiktoken ``Encoding``, a Hugging Face
            tokenizer; None: the ``tokenizer`` attribute of the datamodule or the model.
        name: name of its pictures, ``attention_maps/{name}``.
        every: sampled steps from one run to the next.

    Example:
        >>> TextProbe([3, 1, 4, 1, 5]).encode().labels
        ['3', '1', '4', '1', '5']
    """

    text: str | Sequence[int]
    tokenizer: Any = None
    name: str = "text"
    every: int = 1

    def encode(self, tokenizer: Any = None) -> EncodedProbe:
        tokenizer = self.tokenizer or tokenizer
        if isinstance(self.text, str):
            tokenizer = checked_tokenizer(tokenizer, f"{self.text!r} is a text", "TextProbe(text, tokenizer)")
        ids = token_ids(tokenizer, self.text)
        labels = [str(i) for i in ids] if tokenizer is None else token_labels(tokenizer, ids)
        batch = ProbeBatch(torch.tensor([ids]), position_scores)
        return EncodedProbe(self.name, [batch], POSITION_SCORES, labels, is_drawn=True, every=self.every)


@dataclass(frozen=True)
class LayerProbe(TextProbe):
    """A text with which layers are looked at as a whole, now and then.

    ``head_distance`` of each head: Jensen-Shannon divergence to the head of its layer that is most like it, 0..ln 2,
    after 0.001 has been added to each weight (Clark et al. 2019); ``token_spread`` of each layer: how far its tokens
    are from being one and the same, 0..1 (rank collapse, Dong et al. 2021); attention rollout of each layer, as a
    picture (Abnar and Zuidema 2020).

    Attributes:
        text: text of at most 96 tokens, or its token ids.
        tokenizer: tokenizer, as for ``TextProbe``.
        name: name that its tags begin with.
        every: sampled steps from one run to the next.

    Example:
        >>> [score.name for score in LayerProbe([3, 1, 4]).encode().scores]
        ['sink', 'positional', 'head_distance']
    """

    name: str = "layers"
    every: int = 10

    def encode(self, tokenizer: Any = None) -> EncodedProbe:
        encoded = super().encode(tokenizer)
        n = len(encoded.labels or ())
        if n > MAX_MAP_SIZE:
            raise AttentionMonitorError(
                f"A LayerProbe's text may have {MAX_MAP_SIZE} tokens at most, got {n}; give a shorter one."
            )
        return replace(encoded, scores=[*encoded.scores, HEAD_DISTANCE], with_layers=True)
