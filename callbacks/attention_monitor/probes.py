"""Fixed inputs whose patterns can be compared over time, and what is scored on them.

A probe is what the user writes. Encoded, it is batches to call the model on, and for each of them the scores, 0..1 for
every head, that follow from an attention call.
"""

import random
import re
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from .capturing.attention_call import AttentionCall
from .errors import AttentionMonitorError, is_whole
from .snapshots import HeadScore
from .statistics.maps import MAX_MAP_SIZE
from .statistics.row_blocks import RowBlock, spans

# Mean weight on the first token (Gu et al. 2024); share of rows whose largest weight is at one offset (Voita et al.
# 2019).
POSITION_SCORES = (HeadScore("sink", 0.3, is_written=False), HeadScore("positional", 0.9, is_written=False))


# In a shorter text uniform causal attention comes close to a sink: mean weight on the first of 9 tokens is 0.31.
MIN_TOKENS = 16

# No threshold has been published for these: most of a head's weight is there.
REPEAT_SCORES = (HeadScore("induction", 0.5), HeadScore("duplicate_token", 0.5), HeadScore("previous_token", 0.5))

# A head follows a relation when it beats the best fixed offset by this (Voita et al. 2019).
ABOVE_BASELINE = 0.1

ScoreFunction = Callable[[AttentionCall], dict[str, Tensor]]


@dataclass(frozen=True)
class ProbeBatch:
    """One call of the model.

    Attributes:
        inputs: a tensor, or a tuple of arguments, or a dict of keyword arguments.
        score: of a self-attention call on it: name -> (n, H), to be averaged over n and batches.
    """

    inputs: Any
    score: ScoreFunction

    def run(self, model: nn.Module, device: torch.device) -> None:
        """Call the model on it."""
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
        name: of the source of its snapshots.
        batches: that the model is called on.
        scores: what its batches score, in order.
        labels: of the positions of the first batch's first sequence, where they are known.
        is_drawn: its maps are worth a picture.
        with_statistics: the statistics that are taken of training are taken of it too.
        every: sampled steps from one run to the next.
        with_layers: layers are looked at as a whole too.
    """

    name: str
    batches: Sequence[ProbeBatch]
    scores: Sequence[HeadScore] = ()
    labels: list[str] | None = None
    is_drawn: bool = False
    with_statistics: bool = False
    every: int = 1
    with_layers: bool = False

    def run(self, model: nn.Module, watch: Callable[[ProbeBatch], None] | None = None) -> None:
        """Call the model on every batch (``watch`` is told of each before), leaving no trace in it.

        Raises:
            AttentionMonitorError: when the model does not take the probe.
        """
        parameter = next(model.parameters(), None)
        device = torch.device("cpu") if parameter is None else parameter.device
        with undisturbed(model):
            for batch in self.batches:
                if watch is not None:
                    watch(batch)
                try:
                    batch.run(model, device)
                except Exception as error:
                    shape = f" of shape {tuple(batch.inputs.shape)}" if isinstance(batch.inputs, Tensor) else ""
                    reason = f"{type(error).__name__}: {error}".rstrip(".")
                    raise AttentionMonitorError(
                        f"The probe {self.name!r}{shape} could not be run through {type(model).__name__}: "
                        f"{reason}. Texts and tokens are run by model(token_ids), in evaluation mode: make them fit "
                        "its context and vocabulary (vocab_size); for other inputs there is BatchProbe."
                    ) from error


class Probe(ABC):
    """A fixed input that is run through the model at every sampled step.

    Attributes:
        name: of its tags: letters, digits, underscores.
        every: sampled steps from one run to the next; the last step has one too.
    """

    name: str
    every: int

    @abstractmethod
    def encode(self, tokenizer: Any = None) -> EncodedProbe:
        """Ready to be run.

        Args:
            tokenizer: of the datamodule or the model; a probe's own comes first.

        Raises:
            AttentionMonitorError: when it cannot be encoded.
        """


@dataclass(frozen=True)
class TextProbe(Probe):
    """A text to look at: its maps are drawn with its tokens, and heads are scored by position.

    Scores: ``sink``, mean weight on the first token (Gu et al. 2024); ``positional``, largest share of rows whose
    largest weight is at one offset (Voita et al. 2019).

    Attributes:
        text: what the model reads, or its token ids.
        tokenizer: anything with ``encode(text)`` and ``decode(ids)``: a tiktoken ``Encoding``, a Hugging Face
            tokenizer; None: the ``tokenizer`` attribute of the datamodule or the model.
        name: of its pictures, ``attention_maps/{name}``.
        every: sampled steps from one run to the next.
    """

    text: str | Sequence[int]
    tokenizer: Any = None
    name: str = "text"
    every: int = 1

    def encode(self, tokenizer: Any = None) -> EncodedProbe:
        tokenizer = self.tokenizer or tokenizer
        if isinstance(self.text, str):
            tokenizer = _checked(tokenizer, f"{self.text!r} is a text", "TextProbe(text, tokenizer)")
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
        text: of at most 96 tokens.
        tokenizer: as for ``TextProbe``.
        name: of its tags.
        every: sampled steps from one run to the next.
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
        return replace(encoded, with_layers=True)


@dataclass(frozen=True)
class BatchProbe(Probe):
    """A batch of your own: images, other modalities, encoder and decoder inputs, a validation batch.

    The monitor's statistics are taken of it, its first sequence is drawn, and heads are scored as by ``TextProbe``.

    Attributes:
        batch: a tensor for ``model(batch)``, a tuple for ``model(*batch)``, a dict for ``model(**batch)``.
        name: of its tags.
        every: sampled steps from one run to the next.
    """

    batch: Any
    name: str = "batch"
    every: int = 1

    def encode(self, tokenizer: Any = None) -> EncodedProbe:
        if not isinstance(self.batch, Tensor | list | tuple | Mapping):
            raise AttentionMonitorError(
                f"The batch of the probe {self.name!r} must be a tensor, a tuple of arguments or a dict of them, got "
                f"{type(self.batch).__name__}."
            )
        batch = ProbeBatch(self.batch, position_scores)
        return EncodedProbe(self.name, [batch], POSITION_SCORES, is_drawn=True, with_statistics=True, every=self.every)


@dataclass(frozen=True)
class RepeatedTokensProbe(Probe):
    """Random tokens, repeated: what follows can only be known from what followed the first time (Olsson et al. 2022).

    A beginning-of-sequence token, then ``n_tokens`` random tokens ``n_repeats`` times. Scores, mean weights over rows
    and draws: ``induction``, from a token in a later repeat to those that followed its earlier occurrences;
    ``duplicate_token``, to these occurrences; ``previous_token``, to the token before.

    Attributes:
        vocab_size: tokens are drawn below it; None: as many as the tokenizer has.
        n_tokens: that are repeated.
        n_repeats: including the first.
        n_draws: sequences.
        bos: beginning-of-sequence token; None: the tokenizer's, or a random one.
        seed: of the draws.
        name: of its tags.
        every: sampled steps from one run to the next.
    """

    vocab_size: int | None = None
    n_tokens: int = 25
    n_repeats: int = 4
    n_draws: int = 4
    bos: int | None = None
    seed: int = 0
    name: str = "repeated"
    every: int = 1

    def encode(self, tokenizer: Any = None) -> EncodedProbe:
        size = _vocab_size(tokenizer) if self.vocab_size is None else self.vocab_size
        if size is None:
            raise AttentionMonitorError(
                f"The probe {self.name!r} draws random tokens and no tokenizer says how many there are: give "
                "RepeatedTokensProbe(vocab_size=...)."
            )
        twos = (size, self.n_tokens, self.n_repeats)
        if not (all(is_whole(n, 2) for n in twos) and is_whole(self.n_draws, 1) and is_whole(self.seed, 0)):
            raise AttentionMonitorError(
                f"The probe {self.name!r} needs vocab_size, n_tokens and n_repeats of 2 or more, n_draws of 1 or more "
                f"and a seed of 0 or more, got {size}, {self.n_tokens}, {self.n_repeats}, {self.n_draws} and "
                f"{self.seed}."
            )
        bos = getattr(tokenizer, "bos_token_id", None) if self.bos is None else self.bos
        special = set(getattr(tokenizer, "all_special_ids", None) or ())
        ordinary = torch.tensor([token for token in range(size) if token not in special])
        if not len(ordinary) or not (bos is None or is_whole(bos, 0)):
            raise AttentionMonitorError(
                f"The probe {self.name!r} needs tokens that are not special and a token to begin with, got "
                f"{len(ordinary)} of {size} and bos={bos!r}; give vocab_size= and bos=."
            )
        generator = torch.Generator().manual_seed(self.seed)
        rows = []
        for _ in range(self.n_draws):
            first = torch.randint(size, (1,), generator=generator) if bos is None else torch.tensor([bos])
            if len(ordinary) > 2 * self.n_tokens:  # no token twice in a block: where to look is then one place
                block = ordinary[torch.randperm(len(ordinary), generator=generator)[: self.n_tokens]]
            else:
                block = ordinary[torch.randint(len(ordinary), (self.n_tokens,), generator=generator)]
            rows.append(torch.cat([first, block.repeat(self.n_repeats)]))
        tokens = torch.stack(rows)
        batch = ProbeBatch(tokens, partial(repeat_scores, n_tokens=self.n_tokens, shape=(len(rows), tokens.shape[1])))
        return EncodedProbe(self.name, [batch], REPEAT_SCORES, every=self.every)


# a pair of a relation: query, key, name; both a position, or a span of characters, or a word that occurs once
Pair = tuple[Any, Any, str]
Example = tuple[str | Sequence[int], Sequence[Pair]]


@dataclass(frozen=True)
class RelationProbe(Probe):
    """Texts in which it is known which earlier token a token has to look at (Clark et al. 2019, Voita et al. 2019).

    Scores, one for each relation: the share of its pairs for which a head's largest weight, among earlier tokens, is on
    the key. A head has the role when it beats the best fixed offset by 0.1.

    Example:
        >>> RelationProbe([("The cat sat on the mat. It purred.", [("It", "cat", "pronoun")])])

    Attributes:
        examples: texts with pairs (query, key, relation), or a function that returns them. In a text, query and key
            are words that occur in it once, or spans of characters (start, stop); of token ids, positions.
        tokenizer: as for ``TextProbe``; one that keeps every character of the text.
        max_tokens: texts are cut there; None: never.
        name: of its tags.
        every: sampled steps from one run to the next.
    """

    examples: Sequence[Example] | Callable[[], Sequence[Example]]
    tokenizer: Any = None
    max_tokens: int | None = None
    name: str = "relation"
    every: int = 1

    def _checked_examples(self) -> Sequence[Example]:
        if self.max_tokens is not None and not is_whole(self.max_tokens, 1):
            raise AttentionMonitorError(
                f"max_tokens of the probe {self.name!r} must be 1 or more, got {self.max_tokens!r}."
            )
        examples = self.examples() if callable(self.examples) else self.examples
        for example in examples if isinstance(examples, list | tuple) else [examples]:
            text, pairs = example if isinstance(example, list | tuple) and len(example) == 2 else (None, None)
            is_text = isinstance(text, str) or (isinstance(text, list | tuple) and all(is_whole(i, 0) for i in text))
            if not is_text or not isinstance(pairs, list | tuple) or not all(map(_is_pair, pairs)):
                raise AttentionMonitorError(
                    f"An example of the probe {self.name!r} is (text, [(query, key, relation), ...]), the relation a "
                    f"name of letters, digits, spaces, - and _; got {example!r}."
                )
        return examples

    def encode(self, tokenizer: Any = None) -> EncodedProbe:
        tokenizer = self.tokenizer or tokenizer
        by_length: defaultdict[int, list[tuple[list[int], list[_Pair]]]] = defaultdict(list)
        counts: defaultdict[str, Counter[int]] = defaultdict(Counter)  # relation -> offset -> pairs
        totals: Counter[str] = Counter()
        for text, given in self._checked_examples():
            ids, pairs = _encode_example(text, given, tokenizer)
            ids = ids[: self.max_tokens]
            pairs = [pair for pair in pairs if pair.query < len(ids)]
            by_length[len(ids)].append((ids, pairs))
            for pair in pairs:
                totals[pair.relation] += 1
                counts[pair.relation].update(key - pair.query for key in pair.keys)
        if not totals:
            where = f" in the first {self.max_tokens} tokens of a text" if self.max_tokens else ""
            raise AttentionMonitorError(
                f"The probe {self.name!r} has no pairs{where}; give (text, [(query, key, relation)])."
            )
        batches = [
            ProbeBatch(
                torch.tensor([ids for ids, _ in texts]),
                partial(
                    relation_scores,
                    pairs=[(b, pair) for b, (_, pairs) in enumerate(texts) for pair in pairs],
                    shape=(len(texts), length),
                ),
            )
            for length, texts in by_length.items()
        ]
        scores = []
        for name, n in totals.items():
            offset, most = counts[name].most_common(1)[0]
            scores.append(HeadScore(name, most / n + ABOVE_BASELINE, n, most / n, offset))
        return EncodedProbe(self.name, batches, scores, every=self.every)


@dataclass(frozen=True)
class _Pair:
    query: int
    keys: range
    relation: str


def _is_pair(pair: Any) -> bool:
    is_triple = isinstance(pair, list | tuple) and len(pair) == 3 and isinstance(pair[2], str)
    return is_triple and re.fullmatch(r"[\w -]+", pair[2]) is not None  # it goes into tags


def _encode_example(text: str | Sequence[int], given: Sequence[Pair], tokenizer: Any) -> tuple[list[int], list[_Pair]]:
    """Token ids, and the pairs as positions."""
    if isinstance(text, str):
        tokenizer = _checked(tokenizer, "has texts", "RelationProbe(examples, tokenizer)")
        ids, where = _token_spans(tokenizer, text)
    else:
        ids, where = token_ids(tokenizer, text), None
    pairs = []
    for query, key, relation in given:
        query_tokens, key_tokens = (_positions(place, text, where, len(ids)) for place in (query, key))
        if not 0 <= key_tokens[0] <= key_tokens[-1] < query_tokens[-1] < len(ids):
            raise AttentionMonitorError(
                f"Relation {relation!r} has query={query!r}, key={key!r} in a text of {len(ids)} tokens; the key must "
                "come before the query and both lie in the text."
            )
        pairs.append(_Pair(query_tokens[-1], key_tokens, relation))
    return ids, pairs


def _positions(place: Any, text: str | Sequence[int], where: list[tuple[int, int]] | None, n: int) -> range:
    """Tokens of a word, a span of characters, or a position."""
    if where is None:
        if not isinstance(place, int):
            raise AttentionMonitorError(f"In token ids a query or key is a position, got {place!r}.")
        return range(place, place + 1)
    assert isinstance(text, str)
    if isinstance(place, str):
        # a word ends where others begin; punctuation stands by itself
        before, after = (r"(?<!\w)" if place[:1].isalnum() else ""), (r"(?!\w)" if place[-1:].isalnum() else "")
        found = [match.span() for match in re.finditer(f"{before}{re.escape(place)}{after}", text)] if place else []
        if len(found) != 1:
            raise AttentionMonitorError(
                f"The word {place!r} occurs {len(found)} times in {text!r}; give (start, stop) of its characters."
            )
        place = found[0]
    is_span = isinstance(place, list | tuple) and len(place) == 2 and all(is_whole(at, 0) for at in place)
    if not is_span or not place[0] < place[1] <= len(text):
        raise AttentionMonitorError(
            f"In a text a query or key is a word, or (start, stop) of its {len(text)} characters, got {place!r}."
        )
    start, stop = place
    tokens = [i for i, (first, last) in enumerate(where) if first < stop and last > start]
    if not tokens:
        raise AttentionMonitorError(f"There is no token at characters {place!r} of {text!r}.")
    return range(tokens[0], tokens[-1] + 1)


def _token_spans(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids, and the characters of each; special tokens have none."""
    if getattr(tokenizer, "is_fast", False):  # of transformers
        encoded = tokenizer(text, return_offsets_mapping=True)
        return list(encoded["input_ids"]), [tuple(span) for span in encoded["offset_mapping"]]
    ids = token_ids(tokenizer, text)
    ends = [0, *(len(tokenizer.decode(ids[: i + 1])) for i in range(len(ids)))]
    if tokenizer.decode(ids) != text:
        raise AttentionMonitorError(
            f"The tokenizer makes {tokenizer.decode(ids)!r} of {text!r}, so words cannot be found in its tokens; give "
            "token ids and positions."
        )
    return ids, list(pairwise(ends))


def _checked(tokenizer: Any, what: str, instead: str) -> Any:
    """The tokenizer, if it is one."""
    if not hasattr(tokenizer, "encode") or not hasattr(tokenizer, "decode"):
        found = "no tokenizer was found" if tokenizer is None else f"{tokenizer!r} has no encode and decode"
        raise AttentionMonitorError(
            f"The probe {what} but {found} to encode it: use {instead}; or give the datamodule or the module a "
            "`tokenizer`, AttentionRecorder `tokenizer=`, Trainer `processing_class=`."
        )
    return tokenizer


def token_labels(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """What each token stands for; of a character that several share, such as an emoji, the first has it, others ⋯."""
    labels: list[str] = []
    while len(labels) < len(ids):
        start = len(labels)
        for stop in range(start + 1, min(start + 8, len(ids)) + 1):
            label = tokenizer.decode(list(ids[start:stop]))
            if not isinstance(label, str):
                raise AttentionMonitorError(
                    f"The tokenizer's decode gives {label!r} for a token; it has to give a text."
                )
            if "\ufffd" not in label:
                labels += [label, *["⋯"] * (stop - start - 1)]
                break
        else:  # no character
            labels.append(tokenizer.decode([ids[start]]))
    return labels


def token_ids(tokenizer: Any, text: str | Sequence[int]) -> list[int]:
    """The tokens of a text, which may be they already.

    Raises:
        AttentionMonitorError: when there are none, or the tokenizer does not give any.
    """
    encoded: Any = text
    if isinstance(text, str):
        # tiktoken's plain `encode` refuses texts that contain special tokens
        encode = getattr(tokenizer, "encode_ordinary", tokenizer.encode)
        try:
            encoded = encode(text)
        except Exception as error:
            raise AttentionMonitorError(
                f"The tokenizer could not encode the probe {text!r}: {type(error).__name__}: {error}"
            ) from error
        encoded = getattr(encoded, "ids", encoded)  # `tokenizers` wraps them
    ids = encoded.tolist() if isinstance(encoded, Tensor | np.ndarray) else encoded
    if not isinstance(ids, list | tuple) or not all(is_whole(i, 0) for i in ids):
        raise AttentionMonitorError(
            f"A probe is a text that the tokenizer makes a list of token ids of, or that list; got {ids!r}."
        )
    if not ids:
        raise AttentionMonitorError(f"The probe {text!r} has no tokens; give a text to look at.")
    return list(ids)


def _vocab_size(tokenizer: Any) -> int | None:
    """tiktoken, transformers, tokenizers."""
    for name in ("n_vocab", "vocab_size", "get_vocab_size"):
        size = getattr(tokenizer, name, None)
        size = size() if callable(size) else size
        if isinstance(size, int):
            return size
    return None


def position_scores(call: AttentionCall) -> dict[str, Tensor]:
    """``sink`` (B, H) and ``positional`` (1, H); none of a text that is too short to tell."""
    B, H, Q, _ = call.shape
    K = call.n_positions
    if Q < MIN_TOKENS:
        return {}
    on_first = torch.zeros((B, H), dtype=torch.float64, device=call.device)
    n_rows = torch.zeros((B, H), dtype=torch.float64, device=call.device)
    offsets = torch.zeros((H, 2 * K), dtype=torch.float64, device=call.device)  # rows by key - query + K
    for start, stop in spans(call):
        block = RowBlock(call, start, stop)
        weights = block.position_weights  # (B, H, R, K')
        real = block.visible.expand(weights.shape[:3])
        on_first += weights[..., 0].masked_fill(~real, 0).sum(-1)
        n_rows += real.sum(-1)
        counts = block.informative.expand(weights.shape[:3]).double()
        offset = weights.argmax(-1) - block.query_pos + K  # (B, H, R)
        offsets.scatter_add_(1, offset.transpose(0, 1).flatten(1), counts.transpose(0, 1).flatten(1))
    sink = (on_first / n_rows)[n_rows.amin(1) > 0]  # without sequences that are all padding
    return {"sink": sink, "positional": (offsets.amax(-1) / offsets.sum(-1))[None]}


def _is_of(call: AttentionCall, shape: tuple[int, ...]) -> bool:
    """Whether a call's positions are those of tokens (B, T): a model may pool them, or put others before."""
    B, T = shape
    return call.shape[0] == B and call.shape[2:] == (T, T)


def repeat_scores(call: AttentionCall, n_tokens: int, shape: tuple[int, int]) -> dict[str, Tensor]:
    """Mean over rows of the weight on certain earlier tokens (B, H); the first token is no part of the repeats."""
    if not _is_of(call, shape):
        return {}
    pattern = call.pattern()  # (B, H, T, T)
    T = shape[1]

    def mean_weight(offsets: Sequence[int], first_rows: Sequence[int]) -> Tensor:
        # entry t of the diagonal stands in row t + offset
        total = [
            pattern.diagonal(-offset, -2, -1)[..., row - offset :].sum(-1)
            for offset, row in zip(offsets, first_rows, strict=True)
        ]
        return torch.stack(total).sum(0) / (T - first_rows[0])

    back = range(n_tokens, T - 1, n_tokens)  # to each earlier occurrence; row 1 + n_tokens is the first that has one
    rows = [1 + offset for offset in back]
    return {
        "induction": mean_weight([offset - 1 for offset in back], rows),
        "duplicate_token": mean_weight(back, rows),
        "previous_token": mean_weight([1], [1]),
    }


def relation_scores(
    call: AttentionCall, pairs: Sequence[tuple[int, _Pair]], shape: tuple[int, int]
) -> dict[str, Tensor]:
    """relation -> (pairs, H): 1 where the largest weight among earlier tokens is on the key."""
    if not pairs or not _is_of(call, shape):
        return {}
    pattern = call.pattern()  # (B, H, T, T)
    texts, queries = [text for text, _ in pairs], torch.tensor([pair.query for _, pair in pairs], device=call.device)
    rows = pattern[texts, :, queries]  # (pairs, H, T)
    later = torch.arange(rows.shape[-1], device=call.device) >= queries[:, None]
    most, found = rows.masked_fill(later[:, None], -1).max(-1)  # (pairs, H)
    first = torch.tensor([pair.keys.start for _, pair in pairs], device=call.device)[:, None]
    stop = torch.tensor([pair.keys.stop for _, pair in pairs], device=call.device)[:, None]
    hits = ((found >= first) & (found < stop) & (most > 0)).double()  # not where all weight is elsewhere, or NaN
    relations = [pair.relation for _, pair in pairs]
    return {
        name: hits[[i for i, relation in enumerate(relations) if relation == name]] for name in dict.fromkeys(relations)
    }


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards module modes, buffers and random states are as they were."""
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
