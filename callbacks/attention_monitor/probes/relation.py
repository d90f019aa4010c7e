"""Texts in which it is known what has to look at what."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..capturing.attention_call import AttentionCall
from ..errors import AttentionMonitorError, is_whole
from ..snapshots import HeadScore
from ..traits import ABOVE_BASELINE
from .base import EncodedProbe, Probe, ProbeBatch, is_of_tokens
from .tokens import checked_tokenizer, token_ids, token_spans

# query, key and name of a relation; query and key are positions, spans of characters, or words that occur once
Pair = tuple[Any, Any, str]
Example = tuple[str | Sequence[int], Sequence[Pair]]


@dataclass(frozen=True)
class RelationProbe(Probe):
    """Texts in which it is known which earlier token a token has to look at (Clark et al. 2019, Voita et al. 2019).

    Scores, one for each relation: the share of its pairs for which a head's largest weight, among earlier tokens, is on
    the key. A head has the role when it beats the best fixed offset by 0.1.

    Attributes:
        examples: texts with pairs (query, key, relation), or a function that returns them. In a text, query and key
            are words that occur in it once, or spans of characters (start, stop); of token ids, positions.
        tokenizer: tokenizer, as for ``TextProbe``, that keeps every character of the text.
        max_tokens: number of tokens at which texts are cut; None: never.
        name: name that its tags begin with.
        every: sampled steps from one run to the next.

    Example:
        >>> class Letters:
        ...     encode, decode = (lambda self, text: [*map(ord, text)]), (lambda self, ids: "".join(map(chr, ids)))
        >>> probe = RelationProbe([("The cat sat. It purred.", [("It", "cat", "pronoun")])], Letters())
        >>> [score] = probe.encode().scores
        >>> score.name, score.n, score.offset
        ('pronoun', 1, -10)
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
            scores.append(HeadScore(name, threshold=most / n + ABOVE_BASELINE, n=n, baseline=most / n, offset=offset))
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
    """Encode a text: its token ids, and the pairs as positions."""
    if isinstance(text, str):
        tokenizer = checked_tokenizer(tokenizer, "has texts", "RelationProbe(examples, tokenizer)")
        ids, where = token_spans(tokenizer, text)
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
    """Find the tokens of a word, of a span of characters, or at a position."""
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


def relation_scores(
    call: AttentionCall, pairs: Sequence[tuple[int, _Pair]], shape: tuple[int, int]
) -> dict[str, Tensor]:
    """Score pairs, relation -> (pairs, H): 1 where the largest weight among earlier tokens is on the key.

    Args:
        call: self-attention call on texts of one length.
        pairs: number of the text in the batch, and the pair.
        shape: (B, T) of the batch; a call of another shape is not scored.
    """
    if not pairs or not is_of_tokens(call, shape):
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
